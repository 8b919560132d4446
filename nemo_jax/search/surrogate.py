"""Gaussian-process surrogate of the first objective.

The model: the first objective is the sum of the prior's losses, each multiplied
by an unknown factor, up to an unknown smooth function of that sum. The
logarithms of factors and function are a Gaussian process with mean zero.

The other objectives are known exactly. The expected hypervolume improvement
(Emmerich 2005) is therefore the mean, over costs, of the expected improvement
(Jones et al. 1998) of the first objective. All proposals are given the same
standard deviation: computing that of the posterior would take most of the time
of a generation, and did not lead to better fronts.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from nemo_jax import pareto
from nemo_jax.core.types import Array, ArrayLike
from nemo_jax.search.picking import pick
from nemo_jax.search.problem import Population, Problem, Surrogate

# Added to the first objective, in units of its bounds, before the logarithm.
FLOOR = 1e-3
# Standard deviations of the kernel, all in logarithms of the first objective.
CONSTANT, SLOPE, BEND = 1.0, 0.3, 0.3  # of the smooth function
NODE, CHOICE = 0.5, 0.5  # of a factor: the terms of its node and of its choice
NOISE = 0.05  # of the residual
MEMORY = 256  # H, the last evaluations, to which the surrogate is fitted
POINTS = 1024  # T, points in the space of costs for the expected improvement
MEASURED = 32  # proposals whose gain is computed in one step


# In full precision: with the default one of accelerators, a Gram matrix may not
# be positive definite.
_product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def remember(key: Array, seen: Population, evaluated: Population) -> Population:
  """The last H evaluations; random ones if more than H are new.

  Args:
    key: random key.
    seen: [H, ...], the evaluations so far.
    evaluated: [P, ...], the new ones.
  """
  if len(evaluated.choices) > len(seen.choices):
    rows = jax.random.permutation(key, len(evaluated.choices))
    evaluated = jax.tree.map(lambda x: x[rows], evaluated)
  last = lambda old, new: jnp.concatenate([old, new])[-len(old) :]
  return jax.tree.map(last, seen, evaluated)


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
  fiction = rest + _product(node, features.node.T)
  fiction += _product(choice, features.choice.T)
  wrong = jnp.where(known, learned.gap - fiction, 0)
  drawn = node[..., None] + choice.reshape(count, nodes, choices)
  weights = _solve(learned, wrong.T).T
  return jnp.exp(drawn + _log_factors(learned, weights, choices))


def _improvement(best: Any, mean: Any) -> Float[Array, '...']:
  """Expected improvement E[max(best - x, 0)], for log(x + FLOOR) normal.

  The formula is that of a put option's price (Black and Scholes 1973).

  Args:
    best: the value to improve on.
    mean: of log(x + FLOOR), whose standard deviation is NOISE.
  """
  best = best + FLOOR
  z = (jnp.log(best) - mean) / NOISE
  at = jnp.exp(mean + NOISE**2 / 2)
  # Not `ndtr`, which takes four times as long, for accuracy in the tails.
  below = lambda z: (1 + jax.lax.erf(z / np.sqrt(2))) / 2
  return best * below(z) - at * below(z - NOISE)


def _points(
  key: Array, count: int, dimensions: int
) -> Float[Array, '{count} {dimensions}']:
  """Quasi-random points in the unit cube, with a random shift."""
  # The additive recurrence of Roberts (2018), by the root of x^(d+1) = x + 1.
  root = 2.0
  for _ in range(32):
    root = (1 + root) ** (1 / (dimensions + 1))
  steps = root ** -jnp.arange(1.0, dimensions + 1)
  shift = jax.random.uniform(key, (dimensions,))
  return (shift + jnp.arange(count)[:, None] * steps) % 1


def rounds(
  key: Array,
  problem: Problem,
  belief: Belief,
  archive: Population,
  proposals: Int[Array, 'R N'],
  proposer: Int[Array, ' R'],
  places: Int[Array, ' S'],
  count: int,
) -> Float[Array, ' R']:
  """Pick order by expected hypervolume improvement; see `problem.Select`.

  Proposals are picked greedily: each as if the earlier ones were on the front,
  and at most as many of a species as it has places. If more than
  `screening.ROUNDS` are to be picked, each round picks several, and the limits
  may be exceeded by that number.

  Args:
    key: random key.
    problem: with a prior and known objectives.
    belief: predicts the first objective.
    archive: the non-dominated solutions so far.
    proposals: choices of each proposal.
    proposer: species of each proposal; -1 if it must not be picked.
    places: how many proposals of each species may be picked.
    count: how many proposals may be picked in all.

  Returns:
    The round in which each proposal is picked; +inf if it is not.
  """
  ideal, span = problem.ideal, problem.reference - problem.ideal
  known = problem.known_objectives
  assert known is not None  # see `make`
  costs = jax.vmap(known)(proposals)
  points = ideal[1:] + span[1:] * _points(key, POINTS, costs.shape[1])
  within = lambda costs: jnp.all(costs[:, None] <= points, axis=-1)
  # The least first objective on the front within the costs of each point; [T].
  held = (archive.objectives[:, :1] - ideal[0]) / span[0]
  held = jnp.where(within(archive.objectives[:, 1:]), held, 1)
  best = jnp.clip(jnp.min(held, axis=0), 0, 1)
  # The same for each proposal, at its expected improvement; [R, T].
  gain = _improvement(best, expect(problem, belief, proposals)[:, None])
  worth = jnp.where(within(costs), best - gain, jnp.inf)
  return pick(best, worth, proposer, places, count, measured=MEASURED)


def _empty(problem: Problem) -> Population:
  """Evaluations [H, ...], all empty."""
  nodes, objectives = problem.allowed.shape[0], problem.ideal.shape[0]
  return pareto.empty_population(MEMORY, nodes, objectives)


class State(NamedTuple):
  """The last evaluations, and the mean of the posterior given them."""

  seen: Population  # [H, ...]
  belief: Belief


def make(problem: Problem, screens: bool = True) -> Surrogate | None:
  """Surrogate of a problem with a prior; None without one.

  It picks proposals only if all objectives but the first are known. What
  species get as `Feedback.learned` is a `Learned`.

  Args:
    problem: the problem to search.
    screens: whether it picks proposals; if not, it is only fitted.
  """
  if problem.prior is None:
    return None

  def init():
    return State(_empty(problem), nothing(problem))

  def update(key, state, evaluated):
    seen = remember(key, state.seen, evaluated)
    learned = learn(problem, seen)
    return State(seen, believe(learned)), learned

  def select(key, state, archive, proposals, proposer, places, count):
    return rounds(
      key,
      problem,
      state.belief,
      archive,
      proposals,
      proposer,
      places,
      count,
    )

  picks = screens and problem.known_objectives is not None
  return Surrogate(init, update, select if picks else None)
