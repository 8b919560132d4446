"""Gaussian-process surrogate of the first objective.

Its mean is the problem's prior: the first objective is taken to be the sum of
the estimated losses, each with an unknown factor, up to a smooth function of
that sum. The other objectives are known exactly, so that
the expected gain in hypervolume (Emmerich 2005) is a mean, over costs, of
expected improvements (Jones et al. 1998) of the first one. All proposals count
as equally uncertain: how much each is by the posterior takes most of the time
of a generation, and found no more.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nemo_jax import pareto
from nemo_jax.core.types import Array
from nemo_jax.search.problem import Population, Problem, Surrogate
from nemo_jax.search.screening import ROUNDS

# Added to the first objective, in units of its bounds, before the logarithm.
FLOOR = 1e-3
# Standard deviations of the kernel, all in logarithms of the first objective.
CONSTANT, SLOPE, BEND = 1.0, 0.3, 0.3  # of the smooth function
NODE, CHOICE = 0.5, 0.5  # of a factor: the part of the node, of its choice
NOISE = 0.05  # of what is left
MEMORY = 256  # evaluations that are learned from
POINTS = 1024  # at which costs the front is looked at
MEASURED = 32  # proposals whose gain is measured at once


# What accelerators round to fewer bits would leave a Gram matrix indefinite.
_product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def remember(key: Array, seen: Population, evaluated: Population) -> Population:
  """The last of what was evaluated; of too many at once, some at random."""
  if len(evaluated.choices) > len(seen.choices):
    rows = jax.random.permutation(key, len(evaluated.choices))
    evaluated = jax.tree.map(lambda x: x[rows], evaluated)
  last = lambda old, new: jnp.concatenate([old, new])[-len(old) :]
  return jax.tree.map(last, seen, evaluated)


class Features(NamedTuple):
  """What the kernel sees of configurations."""

  level: Array  # [n], logarithm of the estimated loss
  node: Array  # [n, N], share of each node in it: its slope by log factors
  choice: Array  # [n, N x K], the same at the choices that were taken


def _shares(problem: Problem, choices: Array) -> tuple[Array, Array]:
  """Level [n] and shares [n, N] of `Features`."""
  assert problem.prior is not None  # see `make`
  loss = jnp.asarray(problem.prior.loss)
  unit = problem.reference[0] - problem.ideal[0]
  parts = jnp.maximum(_look_up(loss, choices) / unit, 0)
  total = jnp.sum(parts, axis=1, keepdims=True) + FLOOR
  return jnp.log(total[:, 0]), parts / total


def _look_up(table: Array, choices: Array) -> Array:
  """[n, N]: what a table [N, K] has for each node's choice."""
  start = jnp.arange(table.shape[0]) * table.shape[1]
  return table.reshape(-1)[start + choices]


def features(problem: Problem, choices: Array) -> Features:
  """Of configurations [n, N]."""
  level, share = _shares(problem, choices)
  taken = jax.nn.one_hot(choices, problem.allowed.shape[1])
  choice = (share[..., None] * taken).reshape(len(choices), -1)
  return Features(level, share, choice)


def _shared(one: Array, two: Array) -> Array:
  """[n, m]: the part of the kernel that levels [n] and [m] decide."""
  apart = one[:, None] - two
  linear = SLOPE**2 * one[:, None] * two
  return CONSTANT**2 + linear + BEND**2 * jnp.exp(-0.5 * apart**2)


def _kernel(one: Features, two: Features) -> Array:
  """float32[n, m]."""
  nodes = NODE**2 * _product(one.node, two.node.T)
  choices = CHOICE**2 * _product(one.choice, two.choice.T)
  return _shared(one.level, two.level) + nodes + choices


class Learned(NamedTuple):
  """What evaluations say about the factors on the estimated losses."""

  features: Features
  known: Array  # bool[H], the other rows are empty
  gap: Array  # float32[H], logarithms of what the estimate left unexplained
  factor: Array  # float32[H, H], of the Gram matrix by Cholesky


class Belief(NamedTuple):
  """The mean of what was learned."""

  level: Array  # float32[H], of what was seen
  weight: Array  # float32[H], of each in the smooth function
  log_factors: Array  # float32[N, K], on the estimated losses


def learn(problem: Problem, seen: Population) -> Learned:
  """From what was evaluated.

  Args:
    problem: with a prior.
    seen: [H, ...]; empty rows are passed over.
  """
  known = jnp.all(jnp.isfinite(seen.objectives), axis=-1)
  values = (seen.objectives[:, 0] - problem.ideal[0]) / (
    problem.reference[0] - problem.ideal[0]
  )
  values = jnp.maximum(jnp.where(known, values, 1), 0)
  past = features(problem, seen.choices)
  gap = jnp.where(known, jnp.log(values + FLOOR) - past.level, 0)
  gram = jnp.where(known[:, None] & known, _kernel(past, past), 0)
  # Empty rows stand alone.
  gram += jnp.diag(jnp.where(known, NOISE**2, 1.0))
  factor, _ = jax.scipy.linalg.cho_factor(gram, lower=True)
  return Learned(past, known, gap, factor)


def _solve(learned: Learned, values: Array) -> Array:
  """float32[H, ...]: the inverse of the Gram matrix, times values."""
  return jax.scipy.linalg.cho_solve((learned.factor, True), values)


def _log_factors(learned: Learned, weights: Array, choices: int) -> Array:
  """float32[..., N, K]: what weights [..., H] of what was seen amount to."""
  node = NODE**2 * _product(weights, learned.features.node)
  choice = CHOICE**2 * _product(weights, learned.features.choice)
  shape = (*node.shape, choices)
  return node[..., None] + choice.reshape(shape)


def nothing(problem: Problem) -> Belief:
  """The belief before anything was seen."""
  none = jnp.zeros(MEMORY, jnp.float32)
  factors = jnp.zeros(problem.allowed.shape, jnp.float32)
  return Belief(none, none, factors)


def believe(learned: Learned) -> Belief:
  """The mean of the posterior."""
  weight = _solve(learned, learned.gap)
  nodes = learned.features.node.shape[1]
  choices = learned.features.choice.shape[1] // nodes
  factors = _log_factors(learned, weight, choices)
  return Belief(learned.features.level, weight, factors)


def expect(problem: Problem, belief: Belief, choices: Array) -> Array:
  """float32[n]: log(first objective + FLOOR), in its bounds, by the mean.

  Args:
    problem: with a prior.
    belief: from `believe`.
    choices: [n, N].
  """
  level, share = _shares(problem, choices)
  smooth = _product(_shared(level, belief.level), belief.weight)
  factors = _look_up(belief.log_factors, choices)
  return level + smooth + jnp.sum(share * factors, axis=1)


def draw_factors(
  key: Array, problem: Problem, learned: Learned, count: int
) -> Array:
  """float32[count, N, K]: what estimated losses may have to be multiplied by.

  Drawn from the posterior, by Matheron's rule: from the prior, and corrected by
  what such a draw would have got wrong.

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


def _improvement(best: Array, mean: Array) -> Array:
  """E[max(best - x, 0)] for log(x + FLOOR) normal, as an option's price."""
  best = best + FLOOR
  z = (jnp.log(best) - mean) / NOISE
  at = jnp.exp(mean + NOISE**2 / 2)
  # Not ndtr, which takes four times as long to be exact far out.
  below = lambda z: (1 + jax.lax.erf(z / np.sqrt(2))) / 2
  return best * below(z) - at * below(z - NOISE)


def _points(key: Array, count: int, dimensions: int) -> Array:
  """[count, dimensions] in the unit cube, spread evenly, shifted at random."""
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
  proposals: Array,
  proposer: Array,
  places: Array,
  count: int,
) -> Array:
  """float32[R]: pick order by expected hypervolume improvement; +inf if not.

  Each is picked as if those before it were on the front already, and no more of
  a species than it has places. More than ROUNDS are picked a few at once, and
  may exceed by so many. See `problem.Select`.

  Args:
    key: random key.
    problem: with a prior and known objectives.
    belief: by which the first objective is expected.
    archive: the front.
    proposals: int32[R, N].
    proposer: int32[R], the species of each; -1 where it is not to be chosen.
    places: int32[S], how many each species has.
    count: how many are chosen at most.
  """
  ideal, span = problem.ideal, problem.reference - problem.ideal
  known = problem.known_objectives
  assert known is not None  # see `make`
  costs = jax.vmap(known)(proposals)
  points = ideal[1:] + span[1:] * _points(key, POINTS, costs.shape[1])
  within = lambda costs: jnp.all(costs[:, None] <= points, axis=-1)
  # What is attained within the costs of each point; [T].
  held = (archive.objectives[:, :1] - ideal[0]) / span[0]
  held = jnp.where(within(archive.objectives[:, 1:]), held, 1)
  best = jnp.clip(jnp.min(held, axis=0), 0, 1)
  # And by each proposal, as if what is expected of it were certain; [R, T].
  gain = _improvement(best, expect(problem, belief, proposals)[:, None])
  worth = jnp.where(within(costs), best - gain, jnp.inf)
  at_once = -(-count // ROUNDS)

  measured = min(max(MEASURED, 2 * at_once), len(proposals))

  # The best are found lazily (Minoux 1978): a gain can only fall, so that an
  # old one is a bound, and few need to be measured again.
  def choose(carry, index):
    best, bound, turn, free = carry
    closed = jnp.isfinite(turn) | (free[proposer] <= 0) | (proposer < 0)
    bound = jnp.where(closed, -1, bound)

    def measure(state):
      bound, known, _ = state
      _, rows = jax.lax.top_k(bound, measured)
      gain = jnp.mean(jnp.maximum(best - worth[rows], 0), axis=1)
      bound = bound.at[rows].set(jnp.where(closed[rows], -1, gain))
      known = known.at[rows].set(True)
      _, chosen = jax.lax.top_k(bound, at_once)
      return bound, known, chosen

    def unsure(state):
      _, known, chosen = state
      return ~jnp.all(known[chosen])

    start = bound, closed, jnp.zeros(at_once, jnp.int32)
    bound, _, chosen = jax.lax.while_loop(unsure, measure, measure(start))
    new = ~closed[chosen]
    turn = turn.at[chosen].min(jnp.where(new, index, jnp.inf))
    free = free.at[proposer[chosen]].add(-new.astype(free.dtype))
    taken = jnp.where(new[:, None], worth[chosen], jnp.inf)
    best = jnp.minimum(best, jnp.min(taken, axis=0))
    return (best, bound, turn, free), None

  first = jnp.mean(jnp.maximum(best - worth, 0), axis=1)
  start = best, first, jnp.full(len(proposals), jnp.inf), places
  steps = jnp.arange(-(-count // at_once), dtype=jnp.float32)
  (_, _, turn, _), _ = jax.lax.scan(choose, start, steps)
  return turn


def _empty(problem: Problem) -> Population:
  nodes, objectives = problem.allowed.shape[0], problem.ideal.shape[0]
  return pareto.empty_population(MEMORY, nodes, objectives)


class State(NamedTuple):
  """The last evaluations, and the mean of what they say of others."""

  seen: Population  # [H, ...]
  belief: Belief


def make(problem: Problem, screens: bool = True) -> Surrogate | None:
  """The surrogate of a problem with a prior; None without one.

  It picks proposals only where all objectives but the first are known. What
  species are told is a `Learned`.

  Args:
    problem: what is searched.
    screens: whether it picks proposals at all; else it only learns.
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
