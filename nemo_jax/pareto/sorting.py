"""Dominance, fronts and crowding distance."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Real

from nemo_jax.core import checks
from nemo_jax.core.types import Array, InputError

# Rows per step of an unrolled loop.
_UNROLL = 8
# Bytes of a column per step of a loop. XLA on CPUs divides larger steps among
# threads, and waking the threads takes longer than the step itself.
TILE = 2048
# With fewer rows, preparing the faster sort takes longer than it saves.
_FEW = 512


def points(
  objectives: Any, mask: Any = None, kind: str = 'real'
) -> tuple[Real[Array, ' n M'], Bool[Array, ' n'] | None]:
  """Objectives and mask as arrays, checked and in a type to compute with.

  Args:
    objectives: [n, M], one column or more.
    mask: bool[n], or None.
    kind: of the objectives, see `checks.array`.

  Raises:
    InputError: shapes or types do not fit.
  """
  objectives = checks.array('objectives', objectives, 'nM', kind)
  if not objectives.shape[1]:
    raise InputError('objectives have no columns; give one or more')
  if mask is not None:
    mask = checks.array('mask', mask, 'n', 'bool', n=len(objectives))
  return objectives, mask


def dominates(a: Any, b: Any) -> Bool[Array, '...']:
  """Whether `a` dominates `b`: no worse anywhere and better somewhere.

  Args:
    a: [..., M], minimised.
    b: [..., M], broadcasts against `a`.

  Raises:
    InputError: shapes or types do not fit.
  """
  a = checks.array('a', a, '.M', 'number')
  b = checks.array('b', b, '.M', 'number', M=a.shape[-1])
  if {a.dtype, b.dtype} == {jnp.dtype('uint32'), jnp.dtype('int32')}:
    raise InputError('a and b are uint32 and int32; give them one type')
  return jnp.all(a <= b, axis=-1) & jnp.any(a < b, axis=-1)


def clean(
  objectives: Real[Array, 'n M'], mask: Bool[Array, ' n'] | None
) -> Real[Array, 'n M']:
  """Objectives with NaNs and masked rows at the worst value of the type."""
  if jnp.issubdtype(objectives.dtype, jnp.integer):
    worst = np.asarray(np.iinfo(objectives.dtype).max, objectives.dtype)
  else:
    worst = jnp.inf
    objectives = jnp.where(jnp.isnan(objectives), worst, objectives)
  if mask is None:
    return objectives
  return jnp.where(mask[:, None], objectives, worst)


def _flip(bits: Int[Array, ' *s']) -> Int[Array, ' *s']:
  """Bits of float32 to integers in the same order, or back."""
  return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _whole(values: Float[Array, ' *s']) -> Int[Array, ' *s']:
  """Integers in the order of float32 values; XLA sorts integers faster."""
  return _flip(jnp.where(values == 0, 0.0, values).view(jnp.int32))


def sort(values: Float[Array, ' n']) -> Float[Array, ' n']:
  """Sorted values without a NaN: `jnp.sort`, but faster for float32."""
  if values.dtype != jnp.float32:
    return jnp.sort(values)
  return _flip(jnp.sort(_whole(values))).view(jnp.float32)


def sort_keys(objectives: Real[Array, 'n M']) -> list[Real[Array, ' n']]:
  """One key for each objective, in the same order; no NaN.

  Where it is faster, a key is the number of smaller values, which fits in 16
  bits.
  """
  n = objectives.shape[0]
  if objectives.dtype != jnp.float32:
    return [*objectives.T]
  keys = [*_whole(objectives).T]
  if not _FEW <= n < 2**15:
    return keys
  return [jnp.searchsorted(jnp.sort(k), k).astype(jnp.int16) for k in keys]


def order(key: Any, bound: int) -> Int[Array, ' n']:
  """Stable `jnp.argsort` of whole numbers in [0, bound), int32.

  If 32 bits hold both, key and row index are sorted as one number: XLA takes
  four times as long to sort pairs.

  Args:
    key: int32[n].
    bound: larger than every key.

  Raises:
    InputError: the key has another shape or type.
  """
  key = checks.array('key', key, 'n', 'whole')
  n = len(key)
  if bound * n > 2**32:
    return jnp.argsort(key, stable=True).astype(jnp.int32)
  index = jnp.arange(n, dtype=jnp.uint32)
  return (jnp.sort(key.astype(jnp.uint32) * n + index) % n).astype(jnp.int32)


def lexsort(keys: list[Real[Array, ' n']]) -> Int[Array, ' n']:
  """Row indices in lexicographic order of keys from `sort_keys`."""
  if keys[0].dtype != jnp.int16:
    return jnp.lexsort(keys[::-1])
  n = len(keys[0])
  rows = jnp.arange(n)
  for key in keys[::-1]:
    rows = rows[order(key[rows], n)]
  return rows


def _push(
  ranks: Int[Array, ' n'],
  columns: list[Real[Array, ' n']],
  floor: Int[Array, ''],
  pusher: list[Real[Array, '']],
) -> Int[Array, ' n']:
  """Ranks, raised to `floor` in the rows that the row `pusher` dominates.

  These are the rows that are better than it in no column.
  """
  pairs = zip(pusher, columns, strict=True)
  behind = functools.reduce(jnp.logical_and, [x <= y for x, y in pairs], True)
  return jnp.where(behind, jnp.maximum(ranks, floor), ranks)


def nondominated_rank(
  objectives: Any, mask: Any = None, block: Any = 128
) -> Int[Array, ' n']:
  """Front of each row: 0 on the Pareto front, 1 on the one behind it, ...

  Goldberg's ranks as in NSGA-II (Deb et al. 2002), by the rule that a row's
  rank is one more than the largest rank of the rows that dominate it. Rows are
  sorted lexicographically, so that dominating rows come first. `block` rows at
  a time get their final rank and then raise the ranks of all later rows. Time
  O(n^2 M), memory O(n M). Integers of 32 bits are compared exactly.

  Args:
    objectives: [n, M].
    mask: bool[n], valid rows; all if absent. Masked rows get rank n.
    block: rows per block, 1 or more.

  Returns:
    int32[n].

  Raises:
    InputError: shapes or types do not fit.
  """
  objectives, mask = points(objectives, mask, 'number')
  block = checks.whole('block', block)
  n = objectives.shape[0]
  if not n:
    return jnp.zeros(0, jnp.int32)
  keys = sort_keys(clean(objectives, mask))
  order = lexsort(keys)
  keys = [key[order] for key in keys]
  equal = [key[1:] == key[:-1] for key in keys]
  equal = functools.reduce(jnp.logical_and, equal)
  repeated = jnp.concatenate([jnp.zeros(1, bool), equal])
  block = -(-min(block, n) // _UNROLL) * _UNROLL
  size = -(-n // block) * block
  length = TILE // keys[0].dtype.itemsize
  # Room for a tile that begins at the last row.
  padding = (0, size + length - n)
  # The first objective is left out: later rows are no better in it.
  columns = [jnp.pad(key, padding) for key in keys[1:]]
  # Of equal rows only the first raises the ranks of others.
  silent = jnp.pad(repeated, padding, constant_values=True)
  dtype = jnp.int16 if keys[0].dtype == jnp.int16 else jnp.int32
  part = jax.lax.dynamic_slice_in_dim

  # A reduction over pairs of rows would be equivalent, but XLA does not
  # vectorize it on CPUs: it takes 25 times as long.
  def settle(i, ranks):
    start = i * block
    # Within a block, the position replaces the first objective.
    own = [jnp.arange(block, dtype=dtype)]
    own += [part(column, start, block) for column in columns]
    quiet = part(silent, start, block)

    def settle_few(j, ranks):
      few = lambda x: part(x, j * _UNROLL, _UNROLL)
      rows, mute, mine = [few(x) for x in own], few(quiet), few(ranks)
      for k in range(_UNROLL):
        floor = jnp.where(mute[k], 0, mine[k] + 1)
        # One more than the row's own position, so that it does not raise its
        # own rank.
        pusher = [rows[0][k] + 1, *[x[k] for x in rows[1:]]]
        mine = _push(mine, rows, floor, pusher)
        ranks = _push(ranks, own, floor, pusher)
      return ranks

    settled = part(ranks, start, block)
    settled = jax.lax.fori_loop(0, block // _UNROLL, settle_few, settled)
    ranks = jax.lax.dynamic_update_slice_in_dim(ranks, settled, start, 0)
    floors = jnp.where(quiet, 0, settled + 1)

    def push_tile(j, ranks):
      start = (i + 1) * block + j * length
      tile = [part(column, start, length) for column in columns]

      def push_few(j, ranks):
        few = lambda x: part(x, j * _UNROLL, _UNROLL)
        rows, floor = [few(x) for x in own[1:]], few(floors)
        for k in range(_UNROLL):
          ranks = _push(ranks, tile, floor[k], [x[k] for x in rows])
        return ranks

      pushed = part(ranks, start, length)
      pushed = jax.lax.fori_loop(0, block // _UNROLL, push_few, pushed)
      return jax.lax.dynamic_update_slice_in_dim(ranks, pushed, start, 0)

    tiles = (size - (i + 1) * block + length - 1) // length
    return jax.lax.fori_loop(0, tiles, push_tile, ranks)

  ranks = jnp.zeros(size + length, dtype)
  ranks = jax.lax.fori_loop(0, size // block, settle, ranks)[:n]
  first = jax.lax.cummax(jnp.where(repeated, 0, jnp.arange(n)))
  ranks = ranks[first].astype(jnp.int32)
  ranks = jnp.zeros(n, jnp.int32).at[order].set(ranks)
  return ranks if mask is None else jnp.where(mask, ranks, n)


def crowding_distance(
  objectives: Any, ranks: Any = None, mask: Any = None
) -> Float[Array, ' n']:
  """Crowding distance of each row on its own front (Deb et al. 2002).

  The sum over objectives of the gap between the row's two neighbours, divided
  by the front's range. Rows at an end of a front get +inf. An objective whose
  range on a front is zero or infinite adds nothing.

  Args:
    objectives: [n, M].
    ranks: int32[n], the front of each row, from 0 to n; all rows are one front
      if absent.
    mask: bool[n], valid rows; all if absent. Masked rows get -inf.

  Raises:
    InputError: shapes or types do not fit.
  """
  objectives, mask = points(objectives, mask)
  n, _ = objectives.shape
  objectives = clean(objectives, mask)
  if ranks is None:
    ranks = jnp.zeros(n, jnp.int32)
  ranks = checks.array('ranks', ranks, 'n', 'whole', n=n)
  ranks = ranks if mask is None else jnp.where(mask, ranks, n)
  size = jax.ops.segment_sum(jnp.ones(n, jnp.int32), ranks, n + 1)[ranks]

  def one_objective(values):
    order = jnp.lexsort((values, ranks))
    ordered, front = values[order], ranks[order]
    gap = jnp.diff(ordered)
    gap = jnp.where(front[1:] == front[:-1], gap, jnp.inf)
    ends = jnp.full(1, jnp.inf, values.dtype)
    gaps = jnp.concatenate([ends, gap]) + jnp.concatenate([gap, ends])
    span = jax.ops.segment_max(ordered, front, n + 1)
    span -= jax.ops.segment_min(ordered, front, n + 1)
    span = span[front]
    usable = (span > 0) & jnp.isfinite(span)
    scaled = jnp.where(usable, gaps / jnp.where(usable, span, 1), 0)
    return jnp.zeros(n, values.dtype).at[order].set(scaled)

  distance = sum(one_objective(values) for values in objectives.T)
  distance = jnp.where(size <= 2, jnp.inf, distance)
  return distance if mask is None else jnp.where(mask, distance, -jnp.inf)
