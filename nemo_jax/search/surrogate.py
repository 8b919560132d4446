"""Gaussian-process surrogate of the first objective.

Proposals are picked by expected hypervolume improvement (Emmerich 2005). All
objectives but the first are known exactly, so this is the mean, over costs, of
the expected improvement (Jones et al. 1998) of the first objective. All
proposals are given the same standard deviation: computing that of the posterior
would take most of the time of a generation, and did not lead to better fronts.
The posterior is in `gaussian_process`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from nemo_jax import pareto
from nemo_jax.core.types import Array
from nemo_jax.search.gaussian_process import (
  BEND,
  CHOICE,
  CONSTANT,
  FLOOR,
  MEMORY,
  NODE,
  NOISE,
  SLOPE,
  Belief,
  Features,
  Learned,
  believe,
  draw_factors,
  expect,
  features,
  learn,
  nothing,
)
from nemo_jax.search.picking import pick
from nemo_jax.search.problem import Population, Problem, Surrogate

__all__ = [
  'BEND',
  'CHOICE',
  'CONSTANT',
  'FLOOR',
  'MEASURED',
  'MEMORY',
  'NODE',
  'NOISE',
  'POINTS',
  'SLOPE',
  'Belief',
  'Features',
  'Learned',
  'State',
  'believe',
  'draw_factors',
  'expect',
  'features',
  'learn',
  'make',
  'nothing',
  'remember',
  'rounds',
]

POINTS = 1024  # T, points in the space of costs for the expected improvement
MEASURED = 32  # proposals whose gain is computed in one step


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
