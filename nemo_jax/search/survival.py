"""Survival: each species fills its places with its own best members."""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from nemo_jax import pareto
from nemo_jax.core.types import Array, PyTree
from nemo_jax.search.allocation import owners_of, place_of
from nemo_jax.search.problem import Feedback, Population
from nemo_jax.search.screening import Asked, starts


def survive(
  rank: Float[Array, ' rows'],
  pool: Population,
  asked: Asked,
  sizes: Int[Array, ' S'],
) -> tuple[Population, Float[Array, ' P'], Int[Array, ' P']]:
  """The next population, its ranks, and `Feedback.source`.

  Each species fills its places with its own best-ranked members. Places that
  remain are filled with its proposals that were not evaluated; these rows count
  as empty.

  Args:
    rank: of each row of the pool; +inf for a row that cannot survive.
    pool: [2 P, ...], the parents, then the evaluated candidates.
    asked: the candidates and all proposals.
    sizes: places of each species.
  """
  places = asked.row.shape[0]
  count = sizes.shape[0]
  owners = owners_of(sizes, places)
  member = jnp.isfinite(rank)
  group = jnp.where(member, pool.species, count)
  last = 2 * places - 1
  behind = jnp.minimum(rank, last).astype(jnp.int32)
  order = pareto.order((last + 1) * group + behind, (last + 1) * (count + 1))
  first = jnp.searchsorted(group[order], jnp.arange(count))
  members = jax.ops.segment_sum(member.astype(jnp.int32), group, count + 1)
  place = place_of(owners)
  kept = place < members[owners]
  chosen = order[jnp.where(kept, first[owners] + place, 0)]

  evaluated = jax.ops.segment_sum(
    jnp.ones(places, jnp.int32), asked.proposer, count
  )
  start = jnp.asarray(starts(asked.counts))[owners]
  spare = evaluated[owners] + place - members[owners]
  last = jnp.asarray(asked.counts)[owners] - 1
  spare = asked.queue[start + jnp.clip(spare, 0, last)]
  parent = chosen < places
  row = jnp.where(kept, asked.row[jnp.where(parent, 0, chosen - places)], spare)
  source = jnp.where(kept & parent, chosen, places + row - start)
  population = Population(
    choices=jnp.where(
      kept[:, None], pool.choices[chosen], asked.proposed[spare]
    ),
    objectives=jnp.where(kept[:, None], pool.objectives[chosen], jnp.inf),
    species=owners,
  )
  rank = jnp.where(kept, rank[chosen], jnp.inf)
  return population, rank, source.astype(jnp.int32)


def feedback(
  population: Population,
  kept_rank: Float[Array, ' P'],
  source: Int[Array, ' P'],
  asked: Asked,
  offspring_rank: Float[Array, ' P'],
  learned: PyTree,
) -> list[Feedback]:
  """Feedback for each species.

  Args:
    population: from `survive`.
    kept_rank: ranks from `survive`.
    source: from `survive`.
    asked: the candidates and all proposals.
    offspring_rank: rank of each candidate.
    learned: what the surrogate returned for species, or None.
  """
  fitness = jnp.full(len(asked.proposed), jnp.inf)
  fitness = fitness.at[asked.row].set(offspring_rank)
  fitness = jnp.split(fitness, starts(asked.counts)[1:])
  return [
    Feedback(
      population,
      kept_rank,
      population.species == index,
      source,
      fitness[index],
      learned,
    )
    for index in range(len(asked.counts))
  ]
