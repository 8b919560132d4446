"""Ranges of quantizers, for every bit-width at once, from real values."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nemo_jax.core.types import Array
from nemo_jax.quantization.numerics import fake_quant as fake_quant_lib
from nemo_jax.quantization.numerics import observe
from nemo_jax.quantization.numerics.widths import WIDTHS

METHODS = ('least_squares', 'min_max', 'percentile')
SCHEMES = ('symmetric', 'asymmetric')
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
    counts: [observe.BINS], the histogram between them, or a sum of several.
    method: one of METHODS.
    percentile: as for a weight.
  """
  if not isinstance(counts, jax.core.Tracer):
    counts = np.asarray(counts)
    if np.all(counts == np.floor(counts)):
      counts = observe.fitted(counts.astype(np.int64))
  width = (high - low) / observe.BINS
  centers = low + width * (jnp.arange(observe.BINS) + 0.5)
  if method == 'percentile':
    tail = (100 - percentile) / 200
    share = jnp.cumsum(counts) / jnp.sum(counts)
    first, last = jnp.searchsorted(share, jnp.asarray([tail, 1 - tail]))
    low, high = low + width * first, low + width * (last + 1)
  low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
  bounds = (jnp.reshape(low, (1,)), jnp.reshape(high, (1,)))
  table = _range(centers, counts, *bounds, (0,), 'affine', method)
  return Range(*(jnp.reshape(column, (-1,)) for column in table))
