"""Dominance, fronts, duplicates and crowding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from nemo_jax.core import checks
from nemo_jax.core.types import Array, ArrayLike, InputError

# Rows that a loop takes at once, to be written out one after the other.
_UNROLL = 8
# Bytes of a column that a step of a loop works on. XLA on CPUs divides larger
# steps among threads, and to wake these every time takes longer than the step.
TILE = 2048
# Below this many rows, to prepare a faster sort takes longer than it saves.
_FEW = 512


def points(
  objectives, mask=None, kind: str = 'real'
) -> tuple[Array, Array | None]:
  """Objectives [n, M] and mask bool[n], checked, in types to compute with.

  Raises:
    InputError: one has another shape or kind.
  """
  objectives = checks.array('objectives', objectives, 'nM', kind)
  if not objectives.shape[1]:
    raise InputError('objectives have no columns; give one or more')
  if mask is not None:
    mask = checks.array('mask', mask, 'n', 'bool', n=len(objectives))
  return objectives, mask


def dominates(a: ArrayLike, b: ArrayLike) -> Array:
  """Whether `a [..., M]` is no worse everywhere and better somewhere."""
  a = checks.array('a', a, '.M', 'number')
  b = checks.array('b', b, '.M', 'number', M=a.shape[-1])
  if {a.dtype, b.dtype} == {jnp.dtype('uint32'), jnp.dtype('int32')}:
    raise InputError('a and b are uint32 and int32; give them one type')
  return jnp.all(a <= b, axis=-1) & jnp.any(a < b, axis=-1)


def clean(objectives: Array, mask: Array | None) -> Array:
  """Objectives with invalid rows and NaNs at the worst, to dominate nothing."""
  if jnp.issubdtype(objectives.dtype, jnp.integer):
    worst = np.asarray(np.iinfo(objectives.dtype).max, objectives.dtype)
  else:
    worst = jnp.inf
    objectives = jnp.where(jnp.isnan(objectives), worst, objectives)
  if mask is None:
    return objectives
  return jnp.where(mask[:, None], objectives, worst)


def _flip(bits: Array) -> Array:
  """Bits of float32 to whole numbers in the same order, or back."""
  return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _whole(values: Array) -> Array:
  """Whole numbers in the order of float32: XLA takes longer to sort floats."""
  return _flip(jnp.where(values == 0, 0.0, values).view(jnp.int32))


def sort(values: Array) -> Array:
  """`jnp.sort`, faster for float32; no NaN."""
  if values.dtype != jnp.float32:
    return jnp.sort(values)
  return _flip(jnp.sort(_whole(values))).view(jnp.float32)


def sort_keys(objectives: Array) -> list[Array]:
  """A key [n] for each objective that sorts and compares like it; no NaN.

  Where it pays, a key is how many values are smaller, which takes 16 bits.
  """
  n = objectives.shape[0]
  if objectives.dtype != jnp.float32:
    return [*objectives.T]
  keys = [*_whole(objectives).T]
  if not _FEW <= n < 2**15:
    return keys
  return [jnp.searchsorted(jnp.sort(k), k).astype(jnp.int16) for k in keys]


def order(key: ArrayLike, bound: int) -> Array:
  """int32[n]: `jnp.argsort`, stable, of whole numbers in [0, bound).

  Key and place in one number, where 32 bits hold both: XLA takes four times as
  long to sort pairs.
  """
  key = checks.array('key', key, 'n', 'whole')
  n = len(key)
  if bound * n > 2**32:
    return jnp.argsort(key, stable=True).astype(jnp.int32)
  index = jnp.arange(n, dtype=jnp.uint32)
  return (jnp.sort(key.astype(jnp.uint32) * n + index) % n).astype(jnp.int32)


def lexsort(keys: list[Array]) -> Array:
  """Rows in lexicographic order of keys from `sort_keys`."""
  if keys[0].dtype != jnp.int16:
    return jnp.lexsort(keys[::-1])
  n = len(keys[0])
  rows = jnp.arange(n)
  for key in keys[::-1]:
    rows = rows[order(key[rows], n)]
  return rows


def _push(ranks: Array, columns: list, floor: Array, pusher: list) -> Array:
  """Ranks [n], at least `floor` where no column is better than the pusher's."""
  pairs = zip(pusher, columns, strict=True)
  behind = functools.reduce(jnp.logical_and, [x <= y for x, y in pairs], True)
  return jnp.where(behind, jnp.maximum(ranks, floor), ranks)


def nondominated_rank(
  objectives: ArrayLike, mask: ArrayLike | None = None, block: int = 128
) -> Array:
  """int32[n]: 0 on the Pareto front, 1 on the front behind it, and so on.

  Goldberg's ranks as in NSGA-II (Deb et al. 2002), by the rule that a point's
  rank is one more than the largest rank among its dominators. In lexicographic
  order dominators come first, so `block` rows at a time are settled, and then
  push all that come after. Time O(n^2 M), memory O(n M). Masked rows get
  rank n. Integers of 32 bits are compared exactly.
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
  # Room for a tile that begins with the last row.
  padding = (0, size + length - n)
  # In this order the first objective is no better in what comes after.
  columns = [jnp.pad(key, padding) for key in keys[1:]]
  # The first copy of a row pushes for all.
  silent = jnp.pad(repeated, padding, constant_values=True)
  dtype = jnp.int16 if keys[0].dtype == jnp.int16 else jnp.int32
  part = jax.lax.dynamic_slice_in_dim

  # A reduction over pairs of rows would say what these loops say, and XLA would
  # not vectorize it on CPUs: 25 times as long.
  def settle(i, ranks):
    start = i * block
    # Within a block, the place stands in for the first objective.
    own = [jnp.arange(block, dtype=dtype)]
    own += [part(column, start, block) for column in columns]
    quiet = part(silent, start, block)

    def settle_few(j, ranks):
      few = lambda x: part(x, j * _UNROLL, _UNROLL)
      rows, mute, mine = [few(x) for x in own], few(quiet), few(ranks)
      for k in range(_UNROLL):
        floor = jnp.where(mute[k], 0, mine[k] + 1)
        # Nobody pushes itself: it would have to come before itself.
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


def _mix(words: Array) -> Array:
  """uint32, every bit of a word spread over all others (murmur3)."""
  words ^= words >> 16
  words *= jnp.uint32(0x85EBCA6B)
  words ^= words >> 13
  words *= jnp.uint32(0xC2B2AE35)
  return words ^ (words >> 16)


def duplicated(rows: Array, mask: ArrayLike | None = None) -> Array:
  """bool[n]: an earlier valid row of `rows [n, k]` is equal to this one.

  Rows are sorted by a hash of 48 bits or more and then compared with their
  neighbour, so rows that differ are never called equal. Masked rows are never
  duplicates. Narrow numbers are faster: a word of the hash takes several.
  """
  rows = checks.array('rows', rows, 'nk', 'any')
  n = rows.shape[0]
  if mask is None:
    mask = jnp.ones(n, bool)
  mask = checks.array('mask', mask, 'n', 'bool', n=n)
  # -0.0 equals 0.0 but has other bits.
  words = jnp.where(rows == 0, jnp.zeros_like(rows), rows)
  if words.dtype == bool:
    words = words.astype(jnp.uint8)
  if words.dtype.itemsize < 4:
    spare = -words.shape[1] % (4 // words.dtype.itemsize)
    words = jnp.pad(words, ((0, 0), (0, spare)))
  # The low bits of round floats are all zero, and a sum of products of such
  # words would keep them so.
  words = _mix(words.view(jnp.uint32))
  # As many bits of a hash as are sorted at once, and hashes enough for 48.
  bits = 32 - max(n - 1, 1).bit_length()
  size = (-(-48 // bits), words.shape[-1])
  odd = np.random.default_rng(0).integers(0, 2**31, size) * 2 + 1
  by_hash = jnp.arange(n)
  for factors in odd:
    hashes = jnp.sum(
      words * jnp.asarray(factors, jnp.uint32), axis=-1, dtype=jnp.uint32
    )
    # Apart from the valid ones, or they would come between two that are equal.
    hashes = jnp.where(mask, hashes, ~hashes)[by_hash] >> (32 - bits)
    by_hash = by_hash[order(hashes, 2**bits)]
  ordered, valid = rows[by_hash], mask[by_hash]
  equal = jnp.all(ordered[1:] == ordered[:-1], axis=-1)
  equal &= valid[1:] & valid[:-1]
  return jnp.zeros(n, bool).at[by_hash[1:]].set(equal)


def crowding_distance(
  objectives: ArrayLike,
  ranks: Array | None = None,
  mask: ArrayLike | None = None,
) -> Array:
  """float[n]: how far apart a point's neighbours on its own front are.

  Deb et al. 2002: the sum over objectives of the gap between the two
  neighbours, divided by the front's range. Ends of a front get +inf. An
  objective whose range on a front is zero or infinite adds nothing.

  Args:
    objectives: [n, M].
    ranks: int32[n], the front of each row, from 0 to n; all rows one front if
      absent.
    mask: bool[n]; masked rows get -inf.
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
