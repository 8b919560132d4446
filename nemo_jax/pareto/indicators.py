"""What a set is worth as a whole, and what each point adds to it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from nemo_jax.core import checks
from nemo_jax.core.types import Array, ArrayLike, InputError
from nemo_jax.pareto import sorting


def reference_directions(num_objectives: int, partitions: int) -> np.ndarray:
  """float32[W, M]: a uniform grid on the unit simplex (Das and Dennis 1998).

  Every vector of non-negative multiples of 1 / partitions that sums to one;
  W = binomial(partitions + M - 1, M - 1).

  Raises:
    InputError: a number is below one.
  """
  num_objectives = checks.whole('num_objectives', num_objectives)
  partitions = checks.whole('partitions', partitions)
  bars = itertools.combinations(
    range(partitions + num_objectives - 1), num_objectives - 1
  )
  ends = (-1, partitions + num_objectives - 1)
  counts = [np.diff([ends[0], *b, ends[1]]) - 1 for b in bars]
  return np.asarray(counts, np.float32) / partitions


def check_directions(name: str, directions, objectives: int) -> Array:
  """Directions [W, M], one or more, none of them negative or all zero."""
  directions = checks.array(name, directions, 'WM', M=objectives)
  if not len(directions):
    raise InputError(f'there are no {name}; give one or more')
  known = checks.concrete(directions)
  if known is not None and not (
    np.all(np.isfinite(known) & (known >= 0)) and np.all(np.any(known, axis=1))
  ):
    raise InputError(f'{name} have a row that is negative, zero or not finite')
  return directions


def check_point(name: str, point, objectives: int) -> Array:
  """A point [M] without a NaN."""
  point = checks.array(name, point, 'M', M=objectives)
  known = checks.concrete(point)
  if known is not None and np.any(np.isnan(known)):
    raise InputError(f'{name} is {known.tolist()}, which has a NaN')
  return point


def r2(
  objectives: ArrayLike,
  weights: Array,
  ideal: ArrayLike,
  mask: ArrayLike | None = None,
) -> Array:
  """float[...]: the R2 indicator, lower is better; +inf for an empty set.

  Brockhoff et al. 2012: the mean over weight vectors of the least weighted
  Chebyshev distance from the set to the utopian point `ideal [M]`. A row with
  an infinity is no part of a set.

  Args:
    objectives: [n, M].
    weights: [W, M], non-negative, for example `reference_directions`.
    ideal: [M], a point that nothing beats.
    mask: bool[..., n], one set or several of the same rows.
  """
  objectives, _ = sorting.points(objectives)
  n, m = objectives.shape
  weights = check_directions('weights', weights, m)
  ideal = check_point('ideal', ideal, m)
  if mask is None:
    mask = jnp.ones(n, bool)
  mask = checks.array('mask', mask, '.n', 'bool', n=n)
  gap = jnp.abs(sorting.clean(objectives, None) - ideal)
  usable = jnp.all(jnp.isfinite(gap), axis=-1)
  # Zero times infinity is no number.
  gap = jnp.where(usable[:, None], gap, 0)
  reached = mask & usable

  def nearest(weight):
    distance = jnp.max(weight * gap, axis=-1)
    distance = jnp.where(reached, distance, jnp.inf)
    return jnp.min(distance, axis=-1, initial=jnp.inf)

  return jnp.mean(jax.lax.map(nearest, weights), axis=0)


def _exponent(values: Array) -> Array:
  """int32[...]: the power of two below each; far below all where it is none."""
  info = jnp.finfo(values.dtype)
  bits = values.view(f'int{info.bits}') >> info.nmant
  usable = (values > 0) & jnp.isfinite(values)
  exponent = bits.astype(jnp.int32) - (info.maxexp - 1)
  return jnp.where(usable, exponent, -8 * info.maxexp)


def _shift(values: Array, exponent: Array, steps: int = 2) -> Array:
  """Values x 2^exponent, exact; zero or infinity where that is out of range.

  Args:
    values: any shape.
    exponent: int32[...], broadcasts against them.
    steps: so many factors, for one may itself be out of range.
  """
  info = jnp.finfo(values.dtype)
  for left in range(steps, 0, -1):
    step = exponent // left
    exponent -= step
    bits = (step + info.maxexp - 1).astype(f'int{info.bits}') << info.nmant
    values = values * bits.view(values.dtype)
  return values


def _exponents(depth: Array) -> Array:
  """int32[M]: by what powers of two to multiply axes, lest a product overflow.

  Nothing where products of depths [n, M] are far from the ends of their type,
  as they usually are: sums have the same digits then.
  """
  unit = jnp.finfo(depth.dtype).maxexp // 4
  each = _exponent(depth)
  adjust = lambda e: jnp.where((e >= -2 * unit) & (e <= 3 * unit), 0, unit - e)
  # Of the last two axes, whose products are added up first; then of all.
  area = jnp.max(each[:, -2] + each[:, -1])
  last = adjust(area)
  first = adjust(jnp.max(jnp.sum(each, axis=1)) + last)
  wanted = jnp.stack([first, last // 2, last - last // 2])[-depth.shape[1] :]
  most = 4 * unit - 8 - jnp.max(each, axis=0)
  return jnp.where(area > -4 * unit * 4, jnp.minimum(wanted, most), 0)


def hypervolume(
  objectives: ArrayLike, reference: ArrayLike, mask: ArrayLike | None = None
) -> Array:
  """float[]: the exact volume that the set dominates up to `reference [M]`.

  Two objectives: one sweep. Three: points enter in order of the last
  objective, and each lowers a staircase kept over the first (the dimension
  sweep of Fonseca et al. 2006, with a flat array in place of a tree, which
  is what vector units like). Time O(n^2) for three objectives, memory O(n).

  Axes are scaled by powers of two where products would leave the range of the
  type, so that only the volume itself can: to infinity above it, as with an
  objective of -inf or a reference of +inf, and to zero below it. Differences
  and volumes below 1.2e-38 (denormals) are zero.

  Raises:
    InputError: for a number of objectives other than two or three, or a NaN in
      the reference.
  """
  objectives, mask = sorting.points(objectives, mask)
  m = objectives.shape[-1]
  if m not in (2, 3):
    raise InputError(f'hypervolume is exact for 2 or 3 objectives, not {m}')
  reference = check_point('reference', reference, m)
  dtype = jnp.promote_types(objectives.dtype, reference.dtype)
  if not len(objectives):
    return jnp.zeros((), dtype)
  points = sorting.clean(objectives.astype(dtype), mask)
  reference = reference.astype(dtype)
  # A point with one useless objective spans no volume; at the reference its
  # other objectives must not count either.
  useless = jnp.any(points >= reference, axis=-1)
  endless = jnp.isneginf(points) | jnp.isposinf(reference)
  endless = jnp.any(endless & ~useless[:, None])
  points = jnp.where(useless[:, None], reference, points)
  # The difference of the largest numbers must not overflow, either.
  top = jnp.max(jnp.abs(points), axis=0, initial=0)
  near = jnp.finfo(dtype).maxexp - 2
  quarter = jnp.where(_exponent(top) >= near, -2, 0)
  points, reference = _shift(points, quarter), _shift(reference, quarter)
  exponents = _exponents(reference - points)
  volume = sweep(points, reference, exponents)
  volume = _shift(volume, -jnp.sum(exponents + quarter), steps=6)
  volume = jnp.where(jnp.all(useless), 0, volume)
  return jnp.where(endless, jnp.inf, volume)


def sweep(
  points: Array, reference: ArrayLike, exponents: Array | None = None
) -> Array:
  """The volume of points up to the reference, axes x 2^exponents.

  Args:
    points: [n, M]; a row that is at the reference in one objective is at it in
      all.
    reference: [M].
    exponents: int32[M]; none if absent.
  """
  # In the order of the last objective.
  points = points[sorting.lexsort(sorting.sort_keys(points[:, -1:]))]
  height = jnp.diff(points[:, -1], append=reference[-1])
  depth = reference[-2] - points[:, -2]
  if exponents is not None:
    height = _shift(height, exponents[-1])
    depth = _shift(depth, exponents[-2])
  if len(reference) == 2:
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

  places = sorting.sort(points[:, 0])
  width = jnp.diff(places, append=reference[0])
  if exponents is not None:
    width = _shift(width, exponents[0])
  n = points.shape[0]
  length = max(1, min(n, sorting.TILE // places.dtype.itemsize))
  tiles = jnp.pad(places, (0, -n % length)).reshape(-1, length)
  raised = jax.lax.map(raise_tile, tiles).reshape(-1)[:n]
  return jnp.sum(width * raised)
