"""The non-dominated points of all that was seen, in a fixed number of slots."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nemo_jax.core import checks
from nemo_jax.core.types import Array, ArrayLike, InputError
from nemo_jax.pareto import contributions, indicators, sorting

# Points that may be dropped at once, where they do not share what they cover.
_AT_ONCE = 64


class Population(NamedTuple):
  """Solutions, their scores, and who proposed them."""

  choices: Array  # [P, N] int32, the choice taken at every node
  objectives: Array  # [P, M] float32, minimised; +inf in an empty slot
  species: Array  # [P] int32, index of the species that owns the row


def empty_population(
  capacity: int, num_nodes: int, num_objectives: int
) -> Population:
  """A `Population` of `capacity` empty slots.

  Raises:
    InputError: that is not one or more.
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
  reference: ArrayLike | None = None,
) -> Population:
  """The non-dominated rows of both, each objective vector once.

  Rows with an infinity or a NaN never enter. Of rows with equal objectives the
  one already in the archive stays. Occupied slots come first.

  If more rows are non-dominated than there are slots, those go, one after the
  other, that cost least hypervolume up to the reference; of rows beyond it,
  which cost nothing, the furthest, and of equals the newest. Where candidates
  cannot so make up for what they displace, the archive stays as it is: its
  hypervolume never falls but for rounding. With one objective, or more than
  three, the most crowded rows go instead.

  Args:
    archive: [A, ...], empty or from the last call.
    candidates: [P, ...].
    reference: [M], no better than this is worth nothing; the same in all calls.
      If absent, a tenth of its extent behind the worst of the front, anew in
      every call, so that the hypervolume up to a fixed point may fall.

  Raises:
    InputError: shapes or kinds differ, or there is no slot.
  """
  archive, candidates = _checked(archive, candidates)
  capacity = len(archive.choices)
  merged = jax.tree.map(
    lambda a, b: jnp.concatenate([a, b.astype(a.dtype)]), archive, candidates
  )
  objectives = merged.objectives
  m = objectives.shape[1]
  usable = jnp.all(jnp.isfinite(objectives), axis=-1)
  usable &= ~sorting.duplicated(objectives, usable)
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


def _checked(archive, candidates) -> tuple[Population, Population]:
  """Both, as arrays whose shapes fit each other."""

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


def _least_crowded(objectives, front, capacity) -> Array:
  """bool[n]: of the front, as many as there are slots."""
  crowding = sorting.crowding_distance(objectives, mask=front)
  rows = jnp.lexsort((-crowding, ~front))[:capacity]
  return jnp.zeros(len(front), bool).at[rows].set(True)


def _trim(objectives, front, old, capacity, reference) -> Array:
  """bool[n]: of the front, or of the old rows, as many as there are slots.

  Args:
    objectives: [n, M], all within the range of float32.
    front: bool[n], the non-dominated rows, more than there are slots.
    old: bool[n], the rows of the archive so far.
    capacity: slots.
    reference: [M], or None.
  """
  # A difference of two of these does not overflow.
  values = jnp.where((front | old)[:, None], objectives, 0) / 4
  least = jnp.min(values, axis=0, where=front[:, None], initial=jnp.inf)
  most = jnp.max(values, axis=0, where=front[:, None], initial=-jnp.inf)
  if reference is None:
    reference = most + jnp.where(most > least, (most - least) / 10, 1)
  else:
    reference = reference.astype(values.dtype) / 4
  span = reference - least
  units = (values - least) / jnp.where(span > 0, span, 1)
  # How far a row is beyond the reference, at which all of it then is.
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
    goes = _apart(rows, keep, first, excess > _AT_ONCE)
    goes &= jnp.cumsum(goes) <= excess
    return keep & ~jnp.zeros_like(keep).at[first].set(goes)

  kept = jax.lax.while_loop(lambda x: jnp.sum(x) > capacity, drop, front)
  volume = lambda mask: indicators.sweep(only(mask), ones)
  # As a loop, so that it is compiled once.
  now, before = jax.lax.map(volume, jnp.stack([kept, old]))
  return jnp.where(now >= before, kept, old)


def _apart(points: Array, keep: Array, first: Array, many: Array) -> Array:
  """bool[k]: which of the rows `first [k]` may go together.

  Those that share with none before them what no other row covers: without
  these, each still costs what it did. All after the first that does share wait
  for the next round, for they may cost more by then than others; not so where
  there are `many`.

  Args:
    points: [n, M], at one where they are no better than the reference.
    keep: bool[n], which of them there are.
    first: int32[k], some of them.
    many: bool[].
  """
  others = keep.at[first].set(False)

  def covered(row):
    """bool[k]: whether another row covers all that this and each share."""
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
