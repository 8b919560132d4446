"""Direct search: real vectors, rounded to the nearest choices."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from nemo_jax.core.types import Array
from nemo_jax.search import blocks, variation
from nemo_jax.search import prior as prior_lib
from nemo_jax.search.problem import Population, Problem, Species, SpeciesBuilder


class State(NamedTuple):
  """Parents, one for each row of the population, and the last offspring."""

  parents: Float[Array, 'P N']  # in [0, K - 1]
  offspring: Float[Array, 'Q N']
  own: Bool[Array, ' P']  # the rows of this species
  population: Population  # [P, ...], of all species
  rank: Float[Array, ' P']  # of all species; +inf where not evaluated


def make(
  problem: Problem,
  population_size: int,
  rounding: Callable[[Array], Array] = jnp.round,
  crossover_eta: int = 15,
  crossover_rate: float = 0.9,
  mutation_eta: int = 20,
  migrant_rate: float = 0.5,
  proposals: int = 256,
) -> Species:
  """Species of real vectors with SBX and polynomial mutation.

  NEMO's first species (arXiv 2106.07611). The operators and their settings are
  the usual ones of NSGA-II. The genotype is a real index of a choice at each
  node, from 0 to K - 1; for consecutive bit-widths this is the paper's range
  of bits. Two things are not in the paper. A parent may be a migrant, a member
  of another species; its genotype is the vector in the middle of what rounds to
  its choices. And if the problem has a prior, the first generation is the front
  of the prior, mutated.

  Args:
    problem: the problem to search.
    population_size: P.
    rounding: from a real index to a whole one, `jnp.round` or `jnp.floor`.
    crossover_eta: distribution index of SBX; with a large one, children stay
      near their parents.
    crossover_rate: share of the offspring that have two parents.
    mutation_eta: distribution index of the mutation.
    migrant_rate: probability that a parent is drawn from all species instead of
      this one; 0 as in the paper.
    proposals: proposals made in a generation, at least; P if that is larger.
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
    """Parents of a block, by tournaments among own rows or among all rows."""
    key_own, key_all, key_migrant = jax.random.split(key, 3)
    win = functools.partial(variation.tournament, count=size)
    rank = jnp.where(state.own, state.rank, jnp.inf)
    own = state.parents[win(key_own, rank, state.own)]
    known = jnp.isfinite(state.rank)
    migrant = win(key_all, state.rank, known)
    vector = jnp.minimum(state.population.choices[migrant] + middle, top)
    # If the migrant is of this species, its genotype is known.
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
