"""How many places of the population each species gets."""

import jax
import jax.numpy as jnp

from nemo_jax import pareto
from nemo_jax.core import checks
from nemo_jax.core.types import Array, ArrayLike, InputError

# By which species are compared; see `utility`.
UTILITIES = ('r2', 'hypervolume', 'front_count')
# Every species keeps so many places, whatever it adds.
LEAST_PLACES = 2


def check_size(population_size: int, species: int) -> None:
  """Raises `InputError` unless there are two places for each species."""
  if not species:
    raise InputError('there are no species; give at least one')
  if population_size < LEAST_PLACES * species:
    raise InputError(
      f'a population of {population_size} is too small for {species} '
      'species: each needs two places'
    )


def check_options(exploration: float, kind: str, objectives: int) -> None:
  """Raises `InputError` for options of `allocate` and `utility`.

  Args:
    exploration: of `allocate`.
    kind: of `utility`.
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


def apportion(shares: Array, places: int, least: int = LEAST_PLACES) -> Array:
  """int32[S]: places by share, at least `least` each, by largest remainder."""
  free = places - least * shares.shape[0]
  exact = shares / jnp.sum(shares) * free
  whole = jnp.floor(exact)
  order = jnp.argsort(jnp.argsort(whole - exact))
  extra = order < free - jnp.sum(whole)
  return (least + whole + extra).astype(jnp.int32)


def owners_of(sizes: Array, places: int) -> Array:
  """int32[P]: the species of each row, rows of a species together."""
  return jnp.searchsorted(
    jnp.cumsum(sizes), jnp.arange(places), side='right'
  ).astype(jnp.int32)


def place_of(owners: Array) -> Array:
  """int32[P]: how many earlier rows have the same owner; owners are sorted."""
  return jnp.arange(owners.shape[0]) - jnp.searchsorted(owners, owners)


def allocate(
  utility: Array, evaluations: Array, places: int, exploration: float
) -> Array:
  """int32[S]: the size of each species, by upper confidence bound.

  The score is v + c sqrt(ln(sum y) / y), where y counts the evaluations of a
  species and v is its utility, scaled so that the best species has 1 and the
  worst 0 (the paper's own scaling is not known). Sizes are proportional to
  the scores; a species without any solution has v = 0.

  Args:
    utility: [S] of each species, lower is better.
    evaluations: int32[S].
    places: P, the sum of the sizes.
    exploration: c; 0 makes sizes proportional to utility, infinity equal.
  """
  known = jnp.isfinite(utility)
  best = jnp.min(utility, where=known, initial=jnp.inf)
  worst = jnp.max(utility, where=known, initial=-jnp.inf)
  span = jnp.where(worst > best, worst - best, 1)
  value = jnp.where(known, (worst - utility) / span, 0)
  # Not as integers, which might wrap.
  total = jnp.sum(evaluations.astype(jnp.float32))
  bonus = jnp.sqrt(jnp.log(jnp.maximum(total, 1)) / jnp.maximum(evaluations, 1))
  # Without this, a tie of all at v = 0 and c = 0 would divide by zero.
  score = value + exploration * bonus + 1e-6
  return apportion(jnp.where(jnp.isinf(exploration), 1, score), places)


def utility(
  kind: str,
  scaled: Array,
  species: Array,
  count: int,
  directions: ArrayLike,
  member: Array,
  rank: Array,
) -> Array:
  """float32[S]: the utility of each species, lower is better.

  The R2 indicator of its members, as in the paper; or, with the sign turned,
  the hypervolume that would be lost without them, or how many of them are on
  the first front, as in the patent. A species without members has +inf.

  Args:
    kind: one of UTILITIES.
    scaled: float32[n, M], objectives from 0, the ideal, to 1, the reference.
    species: int32[n], of each row.
    count: S.
    directions: float32[D, M], of R2.
    member: bool[n], the rows that count.
    rank: int32[n], of non-domination.
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
