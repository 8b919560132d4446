"""Archive: the non-dominated solutions so far, in a fixed number of slots."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from nemo_jax.core import checks
from nemo_jax.core.types import Array, InputError
from nemo_jax.pareto import contributions, duplicates, indicators, sorting

# Most points that are dropped in one round; see `_independent`.
_AT_ONCE = 64


class Population(NamedTuple):
  """Solutions, their objectives, and the species that proposed them."""

  choices: Int[Array, 'P N']  # int32, the choice taken at every node
  objectives: Float[Array, 'P M']  # float32, minimised; +inf in an empty slot
  species: Int[Array, ' P']  # int32, index of the species; -1 in an empty slot


def empty_population(
  capacity: Any, num_nodes: int, num_objectives: int
) -> Population:
  """A `Population` of empty slots.

  Args:
    capacity: number of slots, 1 or more.
    num_nodes: N.
    num_objectives: M.

  Raises:
    InputError: the capacity is not a whole number from 1.
  """
  checks.whole('capacity', capacity)
  return Population(
    choices=jnp.zeros((capacity, num_nodes), jnp.int32),
    objectives=jnp.full((capacity, num_objectives), jnp.inf, jnp.float32),
    species=jnp.full(capacity, -1, jnp.int32),
  )


def archive_insert(
  archive: Population,
  candidates: Population,
  reference: Any = None,
) -> Population:
  """The archive [A, ...] with the non-dominated candidates added.

  Each objective vector is kept once: of rows with equal objectives, the one
  already in the archive. Rows with an infinity or a NaN never enter. Occupied
  slots come first.

  If more rows are non-dominated than there are slots and there are two or three
  objectives, the row with the smallest hypervolume contribution is dropped,
  again and again, until the rest fits. Rows beyond the reference contribute
  nothing; of those the furthest is dropped first, and of equal rows the newest.
  If the result has less hypervolume than the old archive, the old archive is
  returned instead, so its hypervolume never falls except for rounding. With one
  objective, or more than three, the rows with the smallest crowding distance
  are dropped.

  Args:
    archive: [A, ...], empty or from the last call.
    candidates: [P, ...].
    reference: [M], the reference point of the hypervolume; the same in all
      calls. If absent, each call places it a tenth of the front's extent behind
      the front's worst values; the hypervolume up to a fixed point may then
      fall.

  Raises:
    InputError: shapes or types do not fit, or the archive has no slot.
  """
  archive, candidates = _checked(archive, candidates)
  capacity = len(archive.choices)
  merged = jax.tree.map(
    lambda a, b: jnp.concatenate([a, b.astype(a.dtype)]), archive, candidates
  )
  objectives = merged.objectives
  m = objectives.shape[1]
  usable = jnp.all(jnp.isfinite(objectives), axis=-1)
  usable &= ~duplicates.duplicated(objectives, usable)
  front = sorting.nondominated_rank(objectives, usable) == 0
  old = usable & (jnp.arange(len(usable)) < capacity)
  trim = lambda: _least_crowded(objectives, front, capacity)
  if m in (2, 3):
    if reference is not None:
      reference = indicators.check_point('reference', reference, m)
    trim = lambda: _trim(objectives, front, old, capacity, reference)
  keep = jax.lax.cond(jnp.sum(front) > capacity, trim, lambda: front)
  rows = sorting.order((~keep).astype(jnp.int32), 2)[:capacity]
  kept = jax.tree.map(lambda x: x[rows], merged)
  blank = empty_population(capacity, *(x.shape[1] for x in kept[:2]))
  valid = keep[rows]
  return jax.tree.map(
    lambda new, old: jnp.where(
      jnp.expand_dims(valid, range(1, new.ndim)), new, old
    ),
    kept,
    blank,
  )


def _checked(
  archive: Population, candidates: Population
) -> tuple[Population, Population]:
  """Archive and candidates as arrays whose shapes fit each other."""

  def one(name, rows, **sizes):
    choices = checks.array(f'{name}.choices', rows.choices, 'nN', 'whole')
    sizes['n'] = len(choices)
    objectives = checks.array(
      f'{name}.objectives', rows.objectives, 'nM', **sizes
    )
    species = checks.array(
      f'{name}.species', rows.species, 'n', 'whole', **sizes
    )
    return Population(choices, objectives, species)

  archive = one('archive', archive)
  if not len(archive.choices):
    raise InputError('the archive has no slot; give it 1 or more')
  nodes, objectives = (x.shape[1] for x in archive[:2])
  candidates = one('candidates', candidates, M=objectives)
  if candidates.choices.shape[1] != nodes:
    raise InputError(
      f'candidates have {candidates.choices.shape[1]} nodes; the archive has '
      f'{nodes}'
    )
  return archive, candidates


def _least_crowded(
  objectives: Float[Array, 'n M'], front: Bool[Array, ' n'], capacity: int
) -> Bool[Array, ' n']:
  """The rows of the front with the largest crowding distance, as a mask."""
  crowding = sorting.crowding_distance(objectives, mask=front)
  rows = jnp.lexsort((-crowding, ~front))[:capacity]
  return jnp.zeros(len(front), bool).at[rows].set(True)


def _trim(
  objectives: Float[Array, 'n M'],
  front: Bool[Array, ' n'],
  old: Bool[Array, ' n'],
  capacity: int,
  reference: Float[Array, ' M'] | None,
) -> Bool[Array, ' n']:
  """The rows that fill the slots, as a mask; see `archive_insert`.

  Args:
    objectives: finite in all rows of `front` and `old`.
    front: the non-dominated rows, more than there are slots.
    old: the rows of the archive so far.
    capacity: number of slots.
    reference: the reference point, or None.
  """
  # Divided by 4 so that the difference of two values does not overflow.
  values = jnp.where((front | old)[:, None], objectives, 0) / 4
  least = jnp.min(values, axis=0, where=front[:, None], initial=jnp.inf)
  most = jnp.max(values, axis=0, where=front[:, None], initial=-jnp.inf)
  if reference is None:
    reference = most + jnp.where(most > least, (most - least) / 10, 1)
  else:
    reference = reference.astype(values.dtype) / 4
  span = reference - least
  units = (values - least) / jnp.where(span > 0, span, 1)
  # How far a row is beyond the reference. Rows that are beyond it in one
  # objective are moved onto it in all.
  beyond = jnp.max(jnp.where(span > 0, units - 1, jnp.inf), axis=1)
  inside = jnp.where((beyond < 0)[:, None], units, 1)
  ones = jnp.ones(inside.shape[1], inside.dtype)
  only = lambda mask: jnp.where(mask[:, None], inside, ones)

  def drop(keep):
    excess = jnp.sum(keep) - capacity
    rows = only(keep)
    cost = contributions.exclusive_volumes(rows, ones)
    cost = jnp.where(keep, cost, jnp.inf)
    newest = -jnp.arange(len(keep))
    first = jnp.lexsort((newest, -beyond, cost))[:_AT_ONCE]
    goes = _independent(rows, keep, first, excess > _AT_ONCE)
    goes &= jnp.cumsum(goes) <= excess
    return keep & ~jnp.zeros_like(keep).at[first].set(goes)

  kept = jax.lax.while_loop(lambda x: jnp.sum(x) > capacity, drop, front)
  volume = lambda mask: indicators.sweep(only(mask), ones)
  # `map`, so that the volume is compiled once for both sets.
  now, before = jax.lax.map(volume, jnp.stack([kept, old]))
  return jnp.where(now >= before, kept, old)


def _independent(
  points: Float[Array, 'n M'],
  keep: Bool[Array, ' n'],
  first: Int[Array, ' k'],
  many: Bool[Array, ''],
) -> Bool[Array, ' k']:
  """Which of the rows `first` may be dropped in one round, as a mask.

  Dropping a row raises the contribution of another row if the two dominate a
  region together that no third row dominates. A row is therefore chosen only
  if it shares no such region with a row chosen before it. The first row that
  does share one ends the round, because rows after it might then contribute
  more than others; with `many` rows to drop, the round goes on past it.

  Args:
    points: the archive and the candidates; 1 where no better than the
      reference.
    keep: the rows that are still in the set.
    first: indices of rows, smallest contribution first.
    many: whether more rows have to be dropped than fit in one round.
  """
  others = keep.at[first].set(False)

  def covered(row):
    """bool[k]: whether a third row dominates what the row and each share."""
    both = jnp.maximum(points[row], points[first])
    better = jnp.all(points <= both[:, None], axis=-1) & others
    return jnp.any(better, axis=1) | jnp.any(both >= 1, axis=1)

  def choose(chosen, row):
    place, alone = row
    goes = jnp.all(alone | ~chosen)
    return chosen.at[place].set(goes), goes

  place = jnp.arange(len(first))
  alone = jax.lax.map(covered, first) | (place[:, None] <= place)
  _, goes = jax.lax.scan(choose, jnp.zeros(len(first), bool), (place, alone))
  return goes & (many | (jnp.cumsum(~goes) == 0))
