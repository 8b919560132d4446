"""Quality indicators of a set: hypervolume and R2."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from nemo_jax.core import checks
from nemo_jax.core.types import Array, InputError
from nemo_jax.pareto import sorting


def reference_directions(
  num_objectives: Any, partitions: Any
) -> Float[np.ndarray, 'W M']:
  """A uniform grid on the unit simplex (Das and Dennis 1998), float32.

  All vectors of non-negative multiples of 1 / partitions that sum to one;
  W = binomial(partitions + M - 1, M - 1).

  Args:
    num_objectives: M.
    partitions: number of steps from 0 to 1.

  Raises:
    InputError: an argument is not a whole number from 1.
  """
  num_objectives = checks.whole('num_objectives', num_objectives)
  partitions = checks.whole('partitions', partitions)
  bars = itertools.combinations(
    range(partitions + num_objectives - 1), num_objectives - 1
  )
  ends = (-1, partitions + num_objectives - 1)
  counts = [np.diff([ends[0], *b, ends[1]]) - 1 for b in bars]
  return np.asarray(counts, np.float32) / partitions


def check_directions(
  name: str, directions: Any, objectives: int
) -> Float[Array, 'W M']:
  """The directions as an array, checked.

  Args:
    name: of the directions, for messages.
    directions: [W, M].
    objectives: M.

  Raises:
    InputError: there are none, or one is negative, all zero or not finite.
  """
  directions = checks.array(name, directions, 'WM', M=objectives)
  if not len(directions):
    raise InputError(f'there are no {name}; give one or more')
  known = checks.concrete(directions)
  if known is not None and not (
    np.all(np.isfinite(known) & (known >= 0)) and np.all(np.any(known, axis=1))
  ):
    raise InputError(f'{name} have a row that is negative, zero or not finite')
  return directions


def check_point(name: str, point: Any, objectives: int) -> Float[Array, ' M']:
  """The point as an array, checked.

  Args:
    name: of the point, for messages.
    point: [M].
    objectives: M.

  Raises:
    InputError: it has another shape or type, or a NaN.
  """
  point = checks.array(name, point, 'M', M=objectives)
  known = checks.concrete(point)
  if known is not None and np.any(np.isnan(known)):
    raise InputError(f'{name} is {known.tolist()}, which has a NaN')
  return point


def r2(
  objectives: Any, weights: Any, ideal: Any, mask: Any = None
) -> Float[Array, ' *sets']:
  """R2 indicator of each set, lower is better; +inf for an empty set.

  Brockhoff et al. 2012: the mean over weight vectors of the least weighted
  Chebyshev distance from the set to the utopian point. Rows with an infinity
  are left out.

  Args:
    objectives: [n, M].
    weights: [W, M], non-negative, for example `reference_directions`.
    ideal: [M], the utopian point: no row is better in any objective.
    mask: bool[*sets, n], which of the rows are in each set; one set of all rows
      if absent.

  Raises:
    InputError: shapes or types do not fit; a weight vector is negative, zero or
      not finite; the ideal has a NaN.
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
  # A weight of zero times an infinite gap would be NaN.
  gap = jnp.where(usable[:, None], gap, 0)
  reached = mask & usable

  def nearest(weight):
    distance = jnp.max(weight * gap, axis=-1)
    distance = jnp.where(reached, distance, jnp.inf)
    return jnp.min(distance, axis=-1, initial=jnp.inf)

  return jnp.mean(jax.lax.map(nearest, weights), axis=0)


def _exponent(values: Float[Array, ' *s']) -> Int[Array, ' *s']:
  """Binary exponent of each value; a very small one where not positive."""
  info = jnp.finfo(values.dtype)
  bits = values.view(f'int{info.bits}') >> info.nmant
  usable = (values > 0) & jnp.isfinite(values)
  exponent = bits.astype(jnp.int32) - (info.maxexp - 1)
  return jnp.where(usable, exponent, -8 * info.maxexp)


def _shift(
  values: Float[Array, '...'], exponent: Int[Array, '...'], steps: int = 2
) -> Float[Array, '...']:
  """Values x 2^exponent, exact; zero or infinity where that is out of range.

  Args:
    values: any shape.
    exponent: broadcasts against the values.
    steps: number of factors that 2^exponent is divided into, because it may
      itself be out of range.
  """
  info = jnp.finfo(values.dtype)
  for left in range(steps, 0, -1):
    step = exponent // left
    exponent -= step
    bits = (step + info.maxexp - 1).astype(f'int{info.bits}') << info.nmant
    values = values * bits.view(values.dtype)
  return values


def _exponents(depth: Float[Array, 'n M']) -> Int[Array, ' M']:
  """Powers of two by which to multiply the axes, so that no product overflows.

  They are zero where products of depths stay far from the limits of their type,
  as they usually do.
  """
  unit = jnp.finfo(depth.dtype).maxexp // 4
  each = _exponent(depth)
  adjust = lambda e: jnp.where((e >= -2 * unit) & (e <= 3 * unit), 0, unit - e)
  # First for the last two axes, whose products are added up first; then for
  # all.
  area = jnp.max(each[:, -2] + each[:, -1])
  last = adjust(area)
  first = adjust(jnp.max(jnp.sum(each, axis=1)) + last)
  wanted = jnp.stack([first, last // 2, last - last // 2])[-depth.shape[1] :]
  most = 4 * unit - 8 - jnp.max(each, axis=0)
  return jnp.where(area > -4 * unit * 4, jnp.minimum(wanted, most), 0)


def hypervolume(
  objectives: Any, reference: Any, mask: Any = None
) -> Float[Array, '']:
  """Exact hypervolume of the set: the volume it dominates up to the reference.

  For two objectives, one sweep. For three, the dimension sweep of Fonseca et
  al. 2006: points enter in order of the last objective, and each raises a
  staircase kept over the first. The staircase is a flat array instead of a
  tree, which suits vector units. Time O(n^2) for three objectives, memory O(n).

  Axes are scaled by powers of two where products would leave the range of the
  type. Only the volume itself can then leave it: it becomes infinity above the
  range, as with an objective of -inf or a reference of +inf, and zero below it.
  Differences and volumes below 1.2e-38 (denormals) are zero.

  Args:
    objectives: [n, M], two or three columns.
    reference: [M], the reference point.
    mask: bool[n], valid rows; all if absent.

  Raises:
    InputError: another number of objectives, a NaN in the reference, or shapes
      or types that do not fit.
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
  # A point no better than the reference in one objective dominates no volume.
  # It is moved onto the reference, so that its other objectives do not count.
  useless = jnp.any(points >= reference, axis=-1)
  endless = jnp.isneginf(points) | jnp.isposinf(reference)
  endless = jnp.any(endless & ~useless[:, None])
  points = jnp.where(useless[:, None], reference, points)
  # The difference of very large numbers must not overflow either.
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
  points: Float[Array, 'n M'],
  reference: Float[Array, ' M'],
  exponents: Int[Array, ' M'] | None = None,
) -> Float[Array, '']:
  """Hypervolume of the points, with axes multiplied by 2^exponents.

  Args:
    points: a row that equals the reference in one objective equals it in all.
    reference: the reference point.
    exponents: int32; all zero if absent.
  """
  # In order of the last objective.
  points = points[sorting.lexsort(sorting.sort_keys(points[:, -1:]))]
  height = jnp.diff(points[:, -1], append=reference[-1])
  depth = reference[-2] - points[:, -2]
  if exponents is not None:
    height = _shift(height, exponents[-1])
    depth = _shift(depth, exponents[-2])
  if len(reference) == 2:
    return jnp.sum(height * jax.lax.cummax(depth))

  # Each step is elementwise, because XLA vectorizes such loops on CPUs; the sum
  # over the staircase comes once, at the end.
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
