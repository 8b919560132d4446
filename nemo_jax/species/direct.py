"""Continuous direct search: a real vector, rounded to the nearest choice."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nemo_jax import variation
from nemo_jax.base import Array, Problem, Species


class State(NamedTuple):
  """Parents, run parallel to the population, and the last offspring."""

  parents: Array  # [P, N] float32, each in [0, K - 1]
  offspring: Array  # [P, N] float32
  rank: Array  # [P] float32, +inf where the row is not this species'
  own: Array  # [P] bool


def make(
  problem: Problem,
  population_size: int,
  rounding=jnp.round,
  crossover_eta: float = 15.0,
  crossover_rate: float = 0.9,
  mutation_eta: float = 20.0,
) -> Species:
  """A species of real vectors under SBX and polynomial mutation.

  NEMO's first species; the operators are those of NSGA-II with their usual
  settings. The vector lives on the index of the choices, 0 to K - 1, which
  for consecutive bit-widths is the paper's range of bits.

  Args:
    problem: what is searched.
    population_size: P.
    rounding: from a real index to a whole one.
    crossover_eta: distribution index of SBX; large stays near the parents.
    crossover_rate: share of the offspring that have two parents.
    mutation_eta: distribution index of the mutation.
  """
  nodes, choices = problem.allowed.shape
  shape = (population_size, nodes)
  top = float(choices - 1)

  def init(key):
    del key
    return State(
      parents=jnp.zeros(shape, jnp.float32),
      offspring=jnp.zeros(shape, jnp.float32),
      rank=jnp.full(population_size, jnp.inf, jnp.float32),
      own=jnp.zeros(population_size, bool),
    )

  def ask(key, state):
    keys = jax.random.split(key, 6)
    pick = lambda k: variation.tournament(k, state.rank, state.own)
    first, second = (state.parents[pick(k)] for k in keys[:2])
    child = variation.sbx(keys[2], first, second, 0.0, top, crossover_eta)
    crossed = jax.random.bernoulli(keys[3], crossover_rate, shape[:1])
    child = jnp.where(crossed[:, None], child, first)
    child = variation.polynomial_mutation(
      keys[4], child, 0.0, top, mutation_eta
    )
    fresh = jax.random.uniform(keys[5], shape, maxval=top)
    child = jnp.where(jnp.any(state.own), child, fresh)
    whole = jnp.clip(rounding(child), 0, choices - 1).astype(jnp.int32)
    proposed = variation.nearest_allowed(whole, problem.allowed)
    return proposed, state._replace(offspring=child)

  def tell(key, state, feedback):
    del key
    both = jnp.concatenate([state.parents, state.offspring])
    return state._replace(
      parents=both[feedback.source],
      rank=jnp.where(feedback.own, feedback.rank, jnp.inf),
      own=feedback.own,
    )

  return Species(init, ask, tell)
