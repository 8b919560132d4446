"""Pareto primitives on fixed-size arrays: pure, jittable, vmappable.

Every function takes `objectives [n, M]`, minimised, and an optional
`mask [n]`, True where a row is valid. A NaN objective counts as +inf. Nothing
here allocates an `n x n` array.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from nemo_jax.base import Array, Population

# Rows that a loop takes at once, to be written out one after the other.
_UNROLL = 8
# Bytes of a column that a step of a loop works on. XLA on CPUs divides larger
# steps among threads, and to wake these every time takes longer than the step.
_TILE = 2048
# Below this many rows, to prepare a faster sort takes longer than it saves.
_FEW = 512


def dominates(a: Array, b: Array) -> Array:
  """Whether `a [..., M]` is no worse everywhere and better somewhere."""
  return jnp.all(a <= b, axis=-1) & jnp.any(a < b, axis=-1)


def _clean(objectives: Array, mask: Array | None) -> Array:
  """Objectives with invalid rows and NaNs at +inf, which dominate nothing."""
  objectives = jnp.where(jnp.isnan(objectives), jnp.inf, objectives)
  if mask is None:
    return objectives
  return jnp.where(mask[:, None], objectives, jnp.inf)


def _flip(bits: Array) -> Array:
  """Bits of float32 to whole numbers in the same order, or back."""
  return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _whole(values: Array) -> Array:
  """Whole numbers in the order of float32: XLA takes longer to sort floats."""
  return _flip(jnp.where(values == 0, 0.0, values).view(jnp.int32))


def _sort(values: Array) -> Array:
  """`jnp.sort`, faster for float32; no NaN."""
  if values.dtype != jnp.float32:
    return jnp.sort(values)
  return _flip(jnp.sort(_whole(values))).view(jnp.float32)


def _sort_keys(objectives: Array) -> list[Array]:
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


def order(key: Array, bound: int) -> Array:
  """int32[n]: `jnp.argsort`, stable, of whole numbers in [0, bound).

  Key and place in one number, where 32 bits hold both: XLA takes four times as
  long to sort pairs.
  """
  n = len(key)
  if bound * n > 2**32:
    return jnp.argsort(key, stable=True).astype(jnp.int32)
  index = jnp.arange(n, dtype=jnp.uint32)
  return (jnp.sort(key.astype(jnp.uint32) * n + index) % n).astype(jnp.int32)


def _lexsort(keys: list[Array]) -> Array:
  """Rows in lexicographic order of keys from `_sort_keys`."""
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
  objectives: Array, mask: Array | None = None, block: int = 128
) -> Array:
  """int32[n]: 0 on the Pareto front, 1 on the front behind it, and so on.

  Goldberg's ranks as in NSGA-II (Deb et al. 2002), by the rule that a point's
  rank is one more than the largest rank among its dominators. In lexicographic
  order dominators come first, so `block` rows at a time are settled, and then
  push all that come after. Time O(n^2 M), memory O(n M). Masked rows get
  rank n.
  """
  n = objectives.shape[0]
  if not n:
    return jnp.zeros(0, jnp.int32)
  keys = _sort_keys(_clean(objectives, mask))
  order = _lexsort(keys)
  keys = [key[order] for key in keys]
  equal = [key[1:] == key[:-1] for key in keys]
  equal = functools.reduce(jnp.logical_and, equal)
  repeated = jnp.concatenate([jnp.zeros(1, bool), equal])
  block = -(-min(block, n) // _UNROLL) * _UNROLL
  size = -(-n // block) * block
  length = _TILE // keys[0].dtype.itemsize
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


def duplicated(rows: Array, mask: Array | None = None) -> Array:
  """bool[n]: an earlier valid row of `rows [n, k]` is equal to this one.

  Rows are sorted by a hash of 48 bits or more and then compared with their
  neighbour, so rows that differ are never called equal. Masked rows are never
  duplicates. Narrow numbers are faster: a word of the hash takes several.
  """
  n = rows.shape[0]
  mask = jnp.ones(n, bool) if mask is None else mask
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
  objectives: Array, ranks: Array | None = None, mask: Array | None = None
) -> Array:
  """float[n]: how far apart a point's neighbours on its own front are.

  Deb et al. 2002: the sum over objectives of the gap between the two
  neighbours, divided by the front's range. Ends of a front get +inf. An
  objective whose range on a front is zero or infinite adds nothing.

  Args:
    objectives: [n, M].
    ranks: int32[n], the front of each row; all rows one front if absent.
    mask: bool[n]; masked rows get -inf.
  """
  n, _ = objectives.shape
  objectives = _clean(objectives, mask)
  ranks = jnp.zeros(n, jnp.int32) if ranks is None else ranks
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


def reference_directions(num_objectives: int, partitions: int) -> np.ndarray:
  """float32[W, M]: a uniform grid on the unit simplex (Das and Dennis 1998).

  Every vector of non-negative multiples of 1 / partitions that sums to one;
  W = binomial(partitions + M - 1, M - 1).
  """
  bars = itertools.combinations(
    range(partitions + num_objectives - 1), num_objectives - 1
  )
  ends = (-1, partitions + num_objectives - 1)
  counts = [np.diff([ends[0], *b, ends[1]]) - 1 for b in bars]
  return np.asarray(counts, np.float32) / partitions


def r2(
  objectives: Array, weights: Array, ideal: Array, mask: Array | None = None
) -> Array:
  """float[...]: the R2 indicator, lower is better; +inf for an empty set.

  Brockhoff et al. 2012: the mean over weight vectors of the least weighted
  Chebyshev distance from the set to the utopian point `ideal [M]`.

  Args:
    objectives: [n, M].
    weights: [W, M], non-negative, for example `reference_directions`.
    ideal: [M], a point that nothing beats.
    mask: bool[..., n], one set or several of the same rows.
  """
  mask = jnp.ones(len(objectives), bool) if mask is None else mask
  gap = jnp.abs(_clean(objectives, None) - ideal)
  usable = jnp.all(jnp.isfinite(gap), axis=-1)
  # Zero times infinity is no number.
  gap = jnp.where(usable[:, None], gap, 0)
  reached = mask & usable

  def nearest(weight):
    distance = jnp.max(weight * gap, axis=-1)
    return jnp.min(jnp.where(reached, distance, jnp.inf), axis=-1)

  return jnp.mean(jax.lax.map(nearest, weights), axis=0)


def hypervolume(
  objectives: Array, reference: Array, mask: Array | None = None
) -> Array:
  """float[]: the exact volume that the set dominates up to `reference [M]`.

  Two objectives: one sweep. Three: points enter in order of the last
  objective, and each lowers a staircase kept over the first (the dimension
  sweep of Fonseca et al. 2006, with a flat array in place of a tree, which
  is what vector units like). Time O(n^2) for three objectives, memory O(n).

  Raises:
    ValueError: for a number of objectives other than two or three.
  """
  m = objectives.shape[-1]
  if m not in (2, 3):
    raise ValueError(f'hypervolume is exact for 2 or 3 objectives, not {m}')
  reference = jnp.asarray(reference, objectives.dtype)
  # A point with one useless objective spans no volume; at the reference its
  # other objectives must not count either.
  points = _clean(objectives, mask)
  useless = jnp.any(points >= reference, axis=-1)
  points = jnp.where(useless[:, None], reference, points)
  # In the order of the last objective.
  points = points[_lexsort(_sort_keys(points[:, -1:]))]
  height = jnp.diff(points[:, -1], append=reference[-1])
  depth = reference[-2] - points[:, -2]
  if m == 2:
    return jnp.sum(height * jax.lax.cummax(depth))

  # A step keeps all that the sum over steps needs, and leaves sums over the
  # staircase to the end: elementwise loops are what XLA vectorizes on CPUs.
  def raise_tile(places):
    def enter(state, step):
      stairs, raised = state
      place, depth, height = step
      lifted = jnp.maximum(stairs, depth)
      stairs = jnp.where(places >= place, lifted, stairs)
      return (stairs, raised + height * stairs), None

    start = jnp.zeros_like(places), jnp.zeros_like(places)
    steps = points[:, 0], depth, height
    (_, raised), _ = jax.lax.scan(enter, start, steps, unroll=4)
    return raised

  places = _sort(points[:, 0])
  width = jnp.diff(places, append=reference[0])
  n = points.shape[0]
  length = max(1, min(n, _TILE // places.dtype.itemsize))
  tiles = jnp.pad(places, (0, -n % length)).reshape(-1, length)
  raised = jax.lax.map(raise_tile, tiles).reshape(-1)[:n]
  return jnp.sum(width * raised)


def hyperplane_normalize(
  objectives: Array, ranks: Array, mask: Array | None = None
) -> Array:
  """float[n, M]: objectives with the ideal point at 0 and the nadir at 1.

  NSGA-III (Deb and Jain 2014, section IV-C): the nadir comes from the
  intercepts of the plane through the extreme points of the first front. Where
  that plane is degenerate, the worst of the first front stands in, as in
  pymoo; where even that is no range, the worst of all rows.
  """
  objectives = _clean(objectives, mask)
  m = objectives.shape[-1]
  usable = jnp.all(jnp.isfinite(objectives), axis=-1)
  ideal = jnp.min(objectives, axis=0, where=usable[:, None], initial=jnp.inf)
  ideal = jnp.where(jnp.isfinite(ideal), ideal, 0)
  worst = jnp.max(objectives, axis=0, where=usable[:, None], initial=-jnp.inf)
  first = usable & (ranks == 0)
  front_worst = jnp.max(
    objectives, axis=0, where=first[:, None], initial=-jnp.inf
  )

  # Extreme points: the least achievement-scalarised along each axis (eq. 4).
  shifted = jnp.where(usable[:, None], objectives - ideal, jnp.inf)
  shifted = jnp.where(shifted < 1e-3, 0, shifted)
  weights = jnp.where(jnp.eye(m, dtype=bool), 1, 1e6)
  scalarised = jnp.max(shifted[None] * weights[:, None], axis=-1)
  scalarised = jnp.where(first, scalarised, jnp.inf)
  extremes = objectives[jnp.argmin(scalarised, axis=-1)] - ideal

  plane = jnp.linalg.solve(extremes, jnp.ones(m, objectives.dtype))
  intercepts = 1 / plane
  fits = jnp.all(jnp.abs(extremes @ plane - 1) < 1e-5)
  fits &= jnp.all(intercepts > 1e-6)
  # Where extreme points coincide, rounding makes up a plane that fits.
  scaled = extremes / (worst - ideal)
  scaled /= jnp.linalg.norm(scaled, axis=-1, keepdims=True)
  fits &= jnp.abs(jnp.linalg.det(scaled)) > 1e-5
  nadir = jnp.where(fits, jnp.minimum(ideal + intercepts, worst), front_worst)
  nadir = jnp.where(nadir - ideal <= 1e-6, worst, nadir)
  span = nadir - ideal
  span = jnp.where((span > 0) & jnp.isfinite(span), span, 1e-12)
  return jnp.where(usable[:, None], (objectives - ideal) / span, jnp.inf)


def associate(normalized: Array, directions: Array) -> tuple[Array, Array]:
  """Nearest direction of each row, and the perpendicular distance to it.

  NSGA-III, algorithm 3. Rows `normalized [n, M]`, directions `[W, M]`;
  returns int32[n] and float[n]. Rows with an infinity get direction 0.
  """
  usable = jnp.all(jnp.isfinite(normalized), axis=-1)
  rows = jnp.where(usable[:, None], normalized, 0)
  unit = directions / jnp.linalg.norm(directions, axis=-1, keepdims=True)
  # The least distance is that of the direction which goes the furthest along.
  # No product of matrices: on accelerators it might not be in full precision.
  parts = rows.T[:, :, None] * unit.T[:, None, :]
  niche = jnp.argmax(functools.reduce(jnp.add, parts), axis=-1)
  niche = niche.astype(jnp.int32)
  nearest = unit[niche]
  along = jnp.sum(nearest * rows, axis=-1, keepdims=True)
  distance = jnp.linalg.norm(rows - along * nearest, axis=-1)
  return jnp.where(usable, niche, 0), jnp.where(usable, distance, jnp.inf)


def niching_order(
  key: Array, ranks: Array, niche: Array, distance: Array
) -> Array:
  """int32[n]: row indices, best first, by front and then by niche count.

  NSGA-III, algorithm 4, written without its loop. The algorithm gives the next
  place to a member of the least crowded niche, which is the same as saying:
  the j-th member of a niche waits until every other niche has had j. So a
  member's level is its place within its niche, and the order is that by
  (front, level). The first member of an empty niche is the one closest to its
  direction; all other choices are random.
  """
  n = ranks.shape[0]
  shuffle, ties = jax.random.uniform(key, (2, n))
  group = niche * (n + 1) + ranks
  closest = jnp.lexsort((shuffle, distance, group))
  starts = jnp.ones(n, bool).at[1:].set(jnp.diff(niche[closest]) != 0)
  head = jnp.zeros(n, bool).at[closest].set(starts)

  within = jnp.lexsort((shuffle, 2 * group + ~head))
  index = jnp.arange(n)
  first = jax.lax.cummax(jnp.where(starts, index, 0))
  level = jnp.zeros(n, index.dtype).at[within].set(index - first)
  return jnp.lexsort((ties, level, ranks))


def nsga3_order(
  key: Array,
  objectives: Array,
  directions: Array,
  mask: Array | None = None,
) -> Array:
  """int32[n]: row indices in the order in which NSGA-III would keep them.

  Deb and Jain 2014: fronts first, and within a front the niching around the
  reference `directions [W, M]`. The first k indices are the survivors of a
  selection of k. Rows that are masked or hold an infinity come last.
  """
  objectives = _clean(objectives, mask)
  usable = jnp.all(jnp.isfinite(objectives), axis=-1)
  ranks = nondominated_rank(objectives, usable)
  normalized = hyperplane_normalize(objectives, ranks, usable)
  niche, distance = associate(normalized, directions)
  return niching_order(key, ranks, niche, distance)


def empty_population(capacity: int, num_nodes: int, num_objectives: int):
  """A `Population` of `capacity` empty slots."""
  return Population(
    choices=jnp.zeros((capacity, num_nodes), jnp.int32),
    objectives=jnp.full((capacity, num_objectives), jnp.inf, jnp.float32),
    species=jnp.full(capacity, -1, jnp.int32),
  )


def archive_insert(archive: Population, candidates: Population) -> Population:
  """The non-dominated rows of both, each objective vector once.

  Rows with an infinity or a NaN never enter. Of rows with equal objectives the
  one already in the archive stays. If more rows are non-dominated than there
  are slots, the least crowded ones stay. Occupied slots come first.
  """
  capacity = archive.choices.shape[0]
  merged = jax.tree.map(
    lambda a, b: jnp.concatenate([a, b.astype(a.dtype)]), archive, candidates
  )
  objectives = merged.objectives
  usable = jnp.all(jnp.isfinite(objectives), axis=-1)
  usable &= ~duplicated(objectives, usable)
  keep = nondominated_rank(objectives, usable) == 0
  rows = jax.lax.cond(
    jnp.sum(keep) > capacity,
    lambda: jnp.lexsort((-crowding_distance(objectives, mask=keep), ~keep)),
    lambda: order((~keep).astype(jnp.int32), 2),
  )[:capacity]
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
