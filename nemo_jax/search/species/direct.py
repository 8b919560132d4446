"""Continuous direct search: a real vector, rounded to the nearest choice."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nemo_jax.core.types import Array
from nemo_jax.search import blocks, variation
from nemo_jax.search import prior as prior_lib
from nemo_jax.search.problem import Population, Problem, Species, SpeciesBuilder


class State(NamedTuple):
  """Parents, run parallel to the population, and the last offspring."""

  parents: Array  # [P, N] float32, each in [0, K - 1]
  offspring: Array  # [Q, N] float32
  own: Array  # [P] bool, the rows that are this species'
  population: Population  # of all species
  rank: Array  # [P] float32, of the population, +inf where not evaluated


def make(
  problem: Problem,
  population_size: int,
  rounding=jnp.round,
  crossover_eta: int = 15,
  crossover_rate: float = 0.9,
  mutation_eta: int = 20,
  migrant_rate: float = 0.5,
  proposals: int = 256,
) -> Species:
  """A species of real vectors under SBX and polynomial mutation.

  NEMO's first species; the operators are those of NSGA-II with their usual
  settings. The vector lives on the index of the choices, 0 to K - 1, which
  for consecutive bit-widths is the paper's range of bits. Beyond the paper, a
  parent may be a migrant, a member of another species, read as the vector in
  the middle of its choices; and where the problem has an estimate, the first
  generation is that of the estimate's front, mutated.

  Args:
    problem: what is searched.
    population_size: P.
    rounding: from a real index to a whole one, `jnp.round` or `jnp.floor`.
    crossover_eta: distribution index of SBX; large stays near the parents.
    crossover_rate: share of the offspring that have two parents.
    mutation_eta: distribution index of the mutation.
    migrant_rate: probability that a parent is drawn from all species rather
      than from this one; 0 is the paper's species.
    proposals: Q, how many it makes; P if that is more.
  """
  nodes, choices = problem.allowed.shape
  number, size = blocks.divide(max(population_size, proposals))
  count, shape = number * size, (size, nodes)
  top = float(choices - 1)
  middle = 0.5 if rounding is jnp.floor else 0.0

  def init(key):
    del key
    empty = Population(
      choices=jnp.zeros((population_size, nodes), jnp.int32),
      objectives=jnp.full(
        (population_size, problem.ideal.shape[0]), jnp.inf, jnp.float32
      ),
      species=jnp.full(population_size, -1, jnp.int32),
    )
    return State(
      parents=jnp.zeros((population_size, nodes), jnp.float32),
      offspring=jnp.zeros((count, nodes), jnp.float32),
      own=jnp.zeros(population_size, bool),
      population=empty,
      rank=jnp.full(population_size, jnp.inf, jnp.float32),
    )

  def select(key, state):
    """Parents of a block, won in tournaments among own or all rows."""
    key_own, key_all, key_migrant = jax.random.split(key, 3)
    win = functools.partial(variation.tournament, count=size)
    rank = jnp.where(state.own, state.rank, jnp.inf)
    own = state.parents[win(key_own, rank, state.own)]
    known = jnp.isfinite(state.rank)
    migrant = win(key_all, state.rank, known)
    vector = jnp.minimum(state.population.choices[migrant] + middle, top)
    # A migrant that is of this species needs no reading.
    vector = jnp.where(
      state.own[migrant][:, None], state.parents[migrant], vector
    )
    invited = jax.random.bernoulli(key_migrant, migrant_rate, (size,))
    return jnp.where((invited & jnp.any(known))[:, None], vector, own)

  def breed(key, state):
    keys = jax.random.split(key, 5)
    first, second = select(keys[0], state), select(keys[1], state)
    child = variation.sbx(keys[2], first, second, 0.0, top, crossover_eta)
    crossed = jax.random.bernoulli(keys[3], crossover_rate, (size,))
    child = jnp.where(crossed[:, None], child, first)
    return variation.polynomial_mutation(keys[4], child, 0.0, top, mutation_eta)

  def fresh(key, state):
    del state
    if not prior_lib.is_known(problem):
      return jax.random.uniform(key, shape, maxval=top)
    key_front, key_move = jax.random.split(key)
    known = prior_lib.front(key_front, problem, size) + middle
    known = jnp.minimum(known, top).astype(jnp.float32)
    return variation.polynomial_mutation(
      key_move, known, 0.0, top, mutation_eta
    )

  def propose(state, key):
    child = jax.lax.cond(jnp.any(state.own), breed, fresh, key, state)
    whole = jnp.clip(rounding(child), 0, choices - 1).astype(jnp.int32)
    return variation.nearest_allowed(whole, problem.allowed), child

  def tell(key, state, feedback):
    del key
    return State(
      parents=variation.survivors(
        state.parents, state.offspring, feedback.source
      ),
      offspring=state.offspring,
      own=feedback.own,
      population=feedback.population,
      rank=feedback.rank,
    )

  return Species(
    init=init,
    tell=tell,
    **blocks.asks(propose, number),
  )


BUILDER = SpeciesBuilder(make)
