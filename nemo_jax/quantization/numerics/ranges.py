"""Ranges of quantizers, for every bit-width at once, from real values."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nemo_jax.core.types import Array, InputError
from nemo_jax.quantization.numerics import fake_quant as fake_quant_lib

WIDTHS = tuple(range(fake_quant_lib.MIN_BITS, fake_quant_lib.MAX_BITS + 1))
METHODS = ('least_squares', 'min_max', 'percentile')
SCHEMES = ('symmetric', 'asymmetric')
BINS = 2048
# Weights that are added up in float32 one after the other.
_BLOCK = 2**16
# Clipping is worth searching for where steps are coarse; above this width
# the least squared error is that of the full range to within a rounding.
_SEARCHED_BITS = 8
# Below it one over the scale would overflow; such a tensor is all but zero.
_LEAST_SCALE = 1e-37


class Range(NamedTuple):
  """Scale and zero point of one quantizer, a row for each of WIDTHS."""

  scale: Array  # [B, ...] float32, broadcasts against the tensor
  zero_point: Array  # [B, ...] float32, integers

  def at(self, bits: Array) -> tuple[Array, Array]:
    """Scale and zero point for `bits`, a traced integer."""
    row = jnp.clip(bits, WIDTHS[0], WIDTHS[-1]) - WIDTHS[0]
    return self.scale[row], self.zero_point[row]


def _affine(low: Array, high: Array, bits: Array) -> tuple[Array, Array]:
  """Scale and zero point that put [low, high] and 0 on 2^b codes.

  Jacob et al. 2018, section 3. Data without negatives gets zero point 0 and
  so is unsigned.
  """
  low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
  scale = (high - low) / fake_quant_lib.largest_code(bits)
  scale = jnp.where(scale > _LEAST_SCALE, scale, 1)
  return scale, jnp.round(-low / scale)


def _symmetric(low: Array, high: Array, bits: Array) -> tuple[Array, Array]:
  """Scale that puts the larger of |low| and |high| on the last code."""
  middle = (fake_quant_lib.largest_code(bits) + 1) / 2
  bound = jnp.maximum(jnp.abs(low), jnp.abs(high))
  scale = bound / (middle - 1)
  scale = jnp.where(scale > _LEAST_SCALE, scale, 1)
  return scale, jnp.broadcast_to(middle, scale.shape)


def _shrink(scheme: str) -> Array:
  """[R, 2]: by how much to draw in the ends; symmetric ones go together."""
  steps = jnp.linspace(1, 1 / 32, 32)
  if scheme == 'symmetric':
    return jnp.stack([steps, steps], axis=-1)
  pairs = jnp.meshgrid(steps, steps)
  return jnp.stack([x.ravel() for x in pairs], axis=-1)


@functools.partial(jax.jit, static_argnames=('axes', 'scheme', 'method'))
def _range(values, counts, low, high, axes, scheme, method) -> Range:
  """A `Range` within [low, high]; least squared error by grid search.

  Args:
    values: any shape; `axes` are those that share a range.
    counts: weighs the values; broadcasts against them.
    low: lower bound, `axes` kept at size 1.
    high: upper bound.
    axes: see values.
    scheme: `symmetric` or `affine`.
    method: one of METHODS.
  """
  bounded = {'affine': _affine, 'symmetric': _symmetric}[scheme]
  full = jax.vmap(lambda bits: bounded(low, high, bits))
  if method != 'least_squares':
    return Range(*full(jnp.asarray(WIDTHS)))
  factors = _shrink(scheme)

  def search(bits):
    def error(factor):
      scale, zero = bounded(low * factor[0], high * factor[1], bits)
      held = fake_quant_lib.fake_quant(values, scale, zero, bits)
      return jnp.sum(counts * (held - values) ** 2, axis=axes, keepdims=True)

    best = factors[jnp.argmin(jax.lax.map(error, factors), axis=0)]
    return bounded(low * best[..., 0], high * best[..., 1], bits)

  searched = jax.lax.map(search, jnp.arange(WIDTHS[0], _SEARCHED_BITS + 1))
  rest = full(jnp.arange(_SEARCHED_BITS + 1, WIDTHS[-1] + 1))
  return Range(
    *jax.tree.map(lambda a, b: jnp.concatenate([a, b]), searched, rest)
  )


def weight_range(
  weight: Array,
  channel_axes: tuple[int, ...],
  method: str = 'least_squares',
  scheme: str = 'symmetric',
  percentile: float = 99.99,
  power: Array | float = 1.0,
) -> Range:
  """The range of a weight.

  Args:
    weight: any shape.
    channel_axes: axes with a scale for every index, where the scheme is
      symmetric. The asymmetric one, the paper's, has one scale a tensor.
    method: one of METHODS.
    scheme: one of SCHEMES.
    percentile: for that method, how many per cent of the values lie within.
    power: broadcasts against the weight: what the squared error of each value
      counts, for least squares.
  """
  weight = weight.astype(jnp.float32)
  keep = channel_axes if scheme == 'symmetric' else ()
  axes = tuple(a for a in range(weight.ndim) if a not in keep)
  if method == 'percentile':
    tail = (100 - percentile) / 2
    low = jnp.percentile(weight, tail, axis=axes, keepdims=True)
    high = jnp.percentile(weight, 100 - tail, axis=axes, keepdims=True)
  else:
    low = jnp.min(weight, axis=axes, keepdims=True)
    high = jnp.max(weight, axis=axes, keepdims=True)
  scheme = 'symmetric' if scheme == 'symmetric' else 'affine'
  table = _range(weight, power, low, high, axes, scheme, method)
  # A lone scale is a scalar, for a weight that is seen in several ranks.
  return table if keep else Range(*(jnp.ravel(column) for column in table))


def count(values: Array, low: Array, high: Array) -> Array:
  """uint32[BINS]: how many values lie in each equal part of [low, high].

  Exact for one call; the sum of several may not fit, see `total`.

  Args:
    values: any shape.
    low: of the first part.
    high: of the last.

  Raises:
    InputError: there are 2^32 values or more.
  """
  if values.size >= 2**32:
    raise InputError(f'{values.size} values are too many to count at once')
  counts = jnp.zeros(BINS, jnp.uint32)
  return counts.at[_bins(values, low, high).ravel()].add(1)


def _bins(values: Array, low: Array, high: Array) -> Array:
  """int32[...]: in which equal part of [low, high] each value lies."""
  width = jnp.where(high > low, high - low, 1)
  index = (values.astype(jnp.float32) - low) / width * BINS
  return jnp.clip(index.astype(jnp.int32), 0, BINS - 1)


def histogram(
  values: Array, low: Array, high: Array, weights: Array | None = None
) -> Array:
  """[BINS]: how much lies in each equal part of [low, high].

  Floats, so that sums of many calls never wrap; those of values without
  weights are of 64 bits, and exact, outside of traced functions.

  Args:
    values: any shape.
    low: of the first part.
    high: of the last.
    weights: broadcasts against the values: what each counts; 1 if absent.
  """
  if weights is None:
    counts = count(values, low, high)
    if isinstance(counts, jax.core.Tracer):
      return counts.astype(jnp.float32)
    return np.asarray(counts, np.float64)
  index = _bins(values, low, high)
  weights = jnp.broadcast_to(jnp.asarray(weights, jnp.float32), index.shape)
  size = max(min(index.size, _BLOCK), 1)
  blocks = [
    jnp.pad(x.ravel(), (0, -index.size % size)).reshape(-1, size)
    for x in (index, weights)
  ]

  # A sum stops growing where what is added is too small beside it.
  def add(total, block):
    index, weights = block
    part = jnp.zeros(BINS, jnp.float32).at[index].add(weights)
    # XLA would add to the total one by one.
    return total + jax.lax.optimization_barrier(part), None

  return jax.lax.scan(add, jnp.zeros(BINS, jnp.float32), blocks)[0]


def total(counts: Sequence[Array]) -> Array:
  """The sum of counts [BINS], in shares that fit 32 bits.

  int32, of up to 2^53 values. They are divided by what all have in common, so
  that a range does not depend on how often a sample was seen; where that is
  not enough, so that the share of what lies below each end of a bin is right to
  2^-31. While they are traced, float32.

  Args:
    counts: from `count`, or what `histogram` made without weights.
  """
  if any(isinstance(x, jax.core.Tracer) for x in counts):
    return functools.reduce(jnp.add, [x.astype(jnp.float32) for x in counts])
  return _fitted(np.sum([np.asarray(x, np.int64) for x in counts], axis=0))


def _fitted(counts: np.ndarray) -> np.ndarray:
  """int32[...], in proportion to int64[...]."""
  counts = counts // max(np.gcd.reduce(counts.ravel()), 1)
  below = np.cumsum(counts.ravel())
  # Not the counts but their sums are rounded, lest the errors add up.
  most = np.iinfo(np.int32).max
  if below.size and below[-1] > most:
    below = np.round(below * (most / below[-1])).astype(np.int64)
    counts = np.diff(below, prepend=0).reshape(counts.shape)
  return counts.astype(np.int32)


def activation_range(
  low: Array,
  high: Array,
  counts: Array,
  method: str = 'least_squares',
  percentile: float = 99.99,
) -> Range:
  """The range of an activation, one for the tensor, affine.

  Args:
    low: float32[], the least value seen.
    high: float32[], the greatest.
    counts: [BINS], the histogram between them, or a sum of several.
    method: one of METHODS.
    percentile: as for a weight.
  """
  if not isinstance(counts, jax.core.Tracer):
    counts = np.asarray(counts)
    if np.all(counts == np.floor(counts)):
      counts = _fitted(counts.astype(np.int64))
  width = (high - low) / BINS
  centers = low + width * (jnp.arange(BINS) + 0.5)
  if method == 'percentile':
    tail = (100 - percentile) / 200
    share = jnp.cumsum(counts) / jnp.sum(counts)
    first, last = jnp.searchsorted(share, jnp.asarray([tail, 1 - tail]))
    low, high = low + width * first, low + width * (last + 1)
  low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
  bounds = (jnp.reshape(low, (1,)), jnp.reshape(high, (1,)))
  table = _range(centers, counts, *bounds, (0,), 'affine', method)
  return Range(*(jnp.reshape(column, (-1,)) for column in table))
