"""Gaussian process over the factors on a prior's losses: kernel and posterior.

The model: the first objective is the sum of the prior's losses, each multiplied
by an unknown factor, up to an unknown smooth function of that sum. The
logarithms of factors and function are a Gaussian process with mean zero.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from nemo_jax.core.types import Array, ArrayLike
from nemo_jax.search.problem import Population, Problem

# Added to the first objective, in units of its bounds, before the logarithm.
FLOOR = 1e-3
# Standard deviations of the kernel, all in logarithms of the first objective.
CONSTANT, SLOPE, BEND = 1.0, 0.3, 0.3  # of the smooth function
NODE, CHOICE = 0.5, 0.5  # of a factor: the terms of its node and of its choice
NOISE = 0.05  # of the residual
MEMORY = 256  # H, the last evaluations, to which the surrogate is fitted

# In full precision: with the default one of accelerators, a Gram matrix may not
# be positive definite.
_product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


class Features(NamedTuple):
  """Inputs of the kernel, for n configurations.

  The share of a node in the loss is also the derivative of the loss's logarithm
  by the logarithm of the node's factor.
  """

  level: Float[Array, ' n']  # logarithm of the prior's loss
  node: Float[Array, 'n N']  # share of each node in the loss
  choice: Float[Array, 'n NK']  # the same by node and choice; 0 if not taken


def _shares(
  problem: Problem, choices: Int[ArrayLike, 'n N']
) -> tuple[Float[Array, ' n'], Float[Array, 'n N']]:
  """`level` and `node` of `Features`."""
  assert problem.prior is not None  # see `make`
  loss = jnp.asarray(problem.prior.loss)
  unit = problem.reference[0] - problem.ideal[0]
  parts = jnp.maximum(_look_up(loss, choices) / unit, 0)
  total = jnp.sum(parts, axis=1, keepdims=True) + FLOOR
  return jnp.log(total[:, 0]), parts / total


def _look_up(
  table: Float[Array, 'N K'], choices: Int[ArrayLike, 'n N']
) -> Float[Array, 'n N']:
  """The entry of the table for each node's choice."""
  start = jnp.arange(table.shape[0]) * table.shape[1]
  return table.reshape(-1)[start + choices]


def features(problem: Problem, choices: Int[ArrayLike, 'n N']) -> Features:
  """Inputs of the kernel for configurations."""
  level, share = _shares(problem, choices)
  taken = jax.nn.one_hot(choices, problem.allowed.shape[1])
  choice = (share[..., None] * taken).reshape(len(choices), -1)
  return Features(level, share, choice)


def _shared(
  one: Float[Array, ' n'], two: Float[Array, ' m']
) -> Float[Array, 'n m']:
  """Term of the kernel for the smooth function, between levels."""
  apart = one[:, None] - two
  linear = SLOPE**2 * one[:, None] * two
  return CONSTANT**2 + linear + BEND**2 * jnp.exp(-0.5 * apart**2)


def _kernel(one: Features, two: Features) -> Float[Array, 'n m']:
  """Kernel matrix [n, m] of n and m configurations; float32."""
  nodes = NODE**2 * _product(one.node, two.node.T)
  choices = CHOICE**2 * _product(one.choice, two.choice.T)
  return _shared(one.level, two.level) + nodes + choices


class Learned(NamedTuple):
  """Posterior of the surrogate, given H evaluations."""

  features: Features  # of H configurations
  known: Bool[Array, ' H']  # the other rows are empty
  gap: Float[Array, ' H']  # logarithm of the ratio of measured to prior loss
  factor: Float[Array, 'H H']  # Cholesky factor of the Gram matrix


class Belief(NamedTuple):
  """Mean of the posterior, in the form that predictions need."""

  level: Float[Array, ' H']  # of the evaluated configurations
  weight: Float[Array, ' H']  # of each of them in the smooth function
  log_factors: Float[Array, 'N K']  # on the losses of the prior


def learn(problem: Problem, seen: Population) -> Learned:
  """Posterior of the surrogate, given evaluations.

  Args:
    problem: with a prior.
    seen: [H, ...], the evaluations; empty and failed rows are left out.
  """
  known = jnp.all(jnp.isfinite(seen.objectives), axis=-1)
  values = (seen.objectives[:, 0] - problem.ideal[0]) / (
    problem.reference[0] - problem.ideal[0]
  )
  values = jnp.maximum(jnp.where(known, values, 1), 0)
  past = features(problem, seen.choices)
  gap = jnp.where(known, jnp.log(values + FLOOR) - past.level, 0)
  gram = jnp.where(known[:, None] & known, _kernel(past, past), 0)
  # Empty rows are uncorrelated with all others.
  gram += jnp.diag(jnp.where(known, NOISE**2, 1.0))
  factor, _ = jax.scipy.linalg.cho_factor(gram, lower=True)
  return Learned(past, known, gap, factor)


def _solve(
  learned: Learned, values: Float[Array, 'H ...']
) -> Float[Array, 'H ...']:
  """Product of the inverse Gram matrix with values."""
  return jax.scipy.linalg.cho_solve((learned.factor, True), values)


def _log_factors(
  learned: Learned, weights: Float[Array, '*s H'], choices: int
) -> Float[Array, '*s N K']:
  """Logarithms of factors, for weights of the evaluations; K is `choices`."""
  node = NODE**2 * _product(weights, learned.features.node)
  choice = CHOICE**2 * _product(weights, learned.features.choice)
  shape = (*node.shape, choices)
  return node[..., None] + choice.reshape(shape)


def nothing(problem: Problem) -> Belief:
  """Belief before the first evaluation: factors of one."""
  none = jnp.zeros(MEMORY, jnp.float32)
  factors = jnp.zeros(problem.allowed.shape, jnp.float32)
  return Belief(none, none, factors)


def believe(learned: Learned) -> Belief:
  """Mean of the posterior."""
  weight = _solve(learned, learned.gap)
  nodes = learned.features.node.shape[1]
  choices = learned.features.choice.shape[1] // nodes
  factors = _log_factors(learned, weight, choices)
  return Belief(learned.features.level, weight, factors)


def expect(
  problem: Problem, belief: Belief, choices: Int[ArrayLike, 'n N']
) -> Float[Array, ' n']:
  """Predicted log(first objective + FLOOR), by the mean of the posterior.

  The objective is in units of its bounds: 0 at the ideal, 1 at the reference.

  Args:
    problem: with a prior.
    belief: from `believe`.
    choices: of each configuration.
  """
  level, share = _shares(problem, choices)
  smooth = _product(_shared(level, belief.level), belief.weight)
  factors = _look_up(belief.log_factors, choices)
  return level + smooth + jnp.sum(share * factors, axis=1)


def draw_factors(
  key: Array, problem: Problem, learned: Learned, count: int
) -> Float[Array, '{count} N K']:
  """Draws of the factors on the prior's losses from the posterior; float32.

  By Matheron's rule: a draw from the Gaussian process before any evaluation,
  corrected by the difference between the evaluations and that draw.

  Args:
    key: random key.
    problem: with a prior.
    learned: from `learn`.
    count: of the draws.
  """
  nodes, choices = problem.allowed.shape
  known, features = learned.known, learned.features
  keys = jax.random.split(key, 3)
  node = NODE * jax.random.normal(keys[0], (count, nodes))
  choice = CHOICE * jax.random.normal(keys[1], (count, nodes * choices))
  both = known[:, None] & known
  rest = jnp.where(both, _shared(features.level, features.level), 0)
  rest += NOISE**2 * jnp.eye(len(known))
  rest = jax.random.multivariate_normal(
    keys[2], jnp.zeros(len(known)), rest, (count,), method='cholesky'
  )
  simulated = rest + _product(node, features.node.T)
  simulated += _product(choice, features.choice.T)
  residual = jnp.where(known, learned.gap - simulated, 0)
  drawn = node[..., None] + choice.reshape(count, nodes, choices)
  weights = _solve(learned, residual.T).T
  return jnp.exp(drawn + _log_factors(learned, weights, choices))
