"""Sizes of the species: how the places of the population are divided."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from nemo_jax import pareto
from nemo_jax.core import checks
from nemo_jax.core.types import Array, ArrayLike, InputError

# Measures by which species are compared; see `utility`.
UTILITIES = ('r2', 'hypervolume', 'front_count')
# Every species keeps at least this many places.
LEAST_PLACES = 2


def check_size(population_size: int, species: int) -> None:
  """Raises `InputError` unless there are at least two places for each species.

  Args:
    population_size: P.
    species: S.
  """
  if not species:
    raise InputError('there are no species; give at least one')
  if population_size < LEAST_PLACES * species:
    raise InputError(
      f'a population of {population_size} is too small for {species} '
      'species: each needs two places'
    )


def check_options(exploration: Any, kind: str, objectives: int) -> None:
  """Raises `InputError` for options of `allocate` and `utility` out of range.

  Args:
    exploration: see `allocate`.
    kind: see `utility`.
    objectives: M.
  """
  known = checks.concrete(exploration)
  if known is not None and not known >= 0:
    raise InputError(f'exploration is {exploration}; give 0 or more')
  if kind not in UTILITIES:
    raise InputError(
      f'unknown utility {kind!r}; the choices are {", ".join(UTILITIES)}'
    )
  if kind == 'hypervolume' and objectives not in (2, 3):
    raise InputError('hypervolume as utility needs two or three objectives')


def apportion(
  shares: Float[ArrayLike, ' S'], places: Any, least: int = LEAST_PLACES
) -> Int[Array, ' S']:
  """Places of each species, in proportion to `shares`; int32.

  By the largest remainder method, with at least `least` places each.

  Args:
    shares: not negative, and not all zero.
    places: P, a whole number; may be traced.
    least: places that every species gets.
  """
  free = places - least * shares.shape[0]
  exact = shares / jnp.sum(shares) * free
  whole = jnp.floor(exact)
  order = jnp.argsort(jnp.argsort(whole - exact))
  extra = order < free - jnp.sum(whole)
  return (least + whole + extra).astype(jnp.int32)


def owners_of(sizes: Int[ArrayLike, ' S'], places: int) -> Int[Array, ' P']:
  """Species of each of P = `places` rows, rows of a species together; int32."""
  return jnp.searchsorted(
    jnp.cumsum(sizes), jnp.arange(places), side='right'
  ).astype(jnp.int32)


def place_of(owners: Int[ArrayLike, ' P']) -> Int[Array, ' P']:
  """Position of each row among the rows of its owner; owners are sorted."""
  return jnp.arange(owners.shape[0]) - jnp.searchsorted(owners, owners)


def allocate(
  utility: Float[ArrayLike, ' S'],
  evaluations: Int[ArrayLike, ' S'],
  places: Any,
  exploration: Any,
) -> Int[Array, ' S']:
  """Size of each species, by upper confidence bound; int32.

  The score of a species is v + c sqrt(ln(sum y) / y). y is the number of its
  evaluations, and v its utility, scaled so that the best species has 1 and the
  worst 0 (the scaling of the paper, arXiv 2106.07611, is not known). A species
  without any solution has v = 0. Sizes are proportional to the scores.

  Args:
    utility: of each species, lower is better; +inf without any solution.
    evaluations: of each species.
    places: P, the sum of the sizes; may be traced.
    exploration: c, a number of 0 or more. With 0, sizes are proportional to v;
      with infinity they are equal.
  """
  known = jnp.isfinite(utility)
  best = jnp.min(utility, where=known, initial=jnp.inf)
  worst = jnp.max(utility, where=known, initial=-jnp.inf)
  span = jnp.where(worst > best, worst - best, 1)
  value = jnp.where(known, (worst - utility) / span, 0)
  # In float32, because a sum of integers might overflow.
  total = jnp.sum(evaluations.astype(jnp.float32))
  bonus = jnp.sqrt(jnp.log(jnp.maximum(total, 1)) / jnp.maximum(evaluations, 1))
  # The small term avoids a division by zero if all v are 0 and c = 0.
  score = value + exploration * bonus + 1e-6
  return apportion(jnp.where(jnp.isinf(exploration), 1, score), places)


def utility(
  kind: str,
  scaled: Float[ArrayLike, 'n M'],
  species: Int[ArrayLike, ' n'],
  count: int,
  directions: Float[ArrayLike, 'D M'] | None,
  member: Bool[ArrayLike, ' n'],
  rank: Int[ArrayLike, ' n'],
) -> Float[Array, ' S']:
  """Utility of each species, lower is better; float32.

  `r2`: the R2 indicator of its members, as in the paper (arXiv 2106.07611).
  `hypervolume`: the negative of the hypervolume that would be lost without
  them. `front_count`: the negative of the number of members on the first front,
  as in the patent. A species without members has +inf.

  Args:
    kind: one of UTILITIES.
    scaled: objectives from 0, the ideal, to 1, the reference.
    species: of each row.
    count: S.
    directions: weight vectors of R2; only `r2` needs them.
    member: the rows that count.
    rank: front of each row, 0 the first.
  """
  owned = jnp.arange(count)[:, None] == species  # [S, n]
  if kind == 'r2':
    zeros = jnp.zeros(scaled.shape[1])
    return pareto.r2(scaled, directions, zeros, owned & member)
  if kind == 'hypervolume':
    ones = jnp.ones(scaled.shape[1])
    volume = lambda mask: pareto.hypervolume(scaled, ones, mask & member)
    worth = volume(member) - jax.lax.map(volume, ~owned)
  else:
    worth = jnp.sum(owned & member & (rank == 0), axis=1)
  present = jnp.any(owned & member, axis=1)
  return jnp.where(present, -worth.astype(jnp.float32), jnp.inf)
