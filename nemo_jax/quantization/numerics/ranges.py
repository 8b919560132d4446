"""Calibration of quantization ranges, for all bit-widths at once."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Float, Int, Num, Shaped

from nemo_jax.core.types import Array, ArrayLike
from nemo_jax.quantization.numerics import fake_quant as fake_quant_lib
from nemo_jax.quantization.numerics import observe
from nemo_jax.quantization.numerics.widths import WIDTHS

METHODS = ('least_squares', 'min_max', 'percentile')
SCHEMES = ('symmetric', 'asymmetric')
# Clipped ranges are tried up to this width, where quantization is coarse. At
# wider ones the full range has the least squared error, up to rounding.
_SEARCHED_BITS = 8
# With a smaller scale its inverse would overflow; the tensor is nearly zero.
_LEAST_SCALE = 1e-37


class Range(NamedTuple):
  """Scale and zero point of one quantizer; W rows, one for each of WIDTHS.

  A row broadcasts against the tensor. Zero points are integers.
  """

  scale: Float[Array, 'W ...']
  zero_point: Float[Array, 'W ...']

  def at(
    self, bits: Int[ArrayLike, ''] | int
  ) -> tuple[Float[Array, '*row'], Float[Array, '*row']]:
    """Scale and zero point at a width, which may be traced."""
    row = jnp.clip(bits, WIDTHS[0], WIDTHS[-1]) - WIDTHS[0]
    return self.scale[row], self.zero_point[row]


def _affine(low: Array, high: Array, bits: Array) -> tuple[Array, Array]:
  """Scale and zero point with which 2^b codes span [low, high] and 0.

  Jacob et al. 2018, section 3. Data without negative values has zero point 0,
  which is unsigned quantization.
  """
  low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
  scale = (high - low) / fake_quant_lib.largest_code(bits)
  scale = jnp.where(scale > _LEAST_SCALE, scale, 1)
  return scale, jnp.round(-low / scale)


def _symmetric(low: Array, high: Array, bits: Array) -> tuple[Array, Array]:
  """Scale that maps max(|low|, |high|) to the last code, and zero point."""
  middle = (fake_quant_lib.largest_code(bits) + 1) / 2
  bound = jnp.maximum(jnp.abs(low), jnp.abs(high))
  scale = bound / (middle - 1)
  scale = jnp.where(scale > _LEAST_SCALE, scale, 1)
  return scale, jnp.broadcast_to(middle, scale.shape)


def _shrink(scheme: str) -> Array:
  """Factors [R, 2] to try on the two ends of a range.

  For symmetric ranges both are the same.
  """
  steps = jnp.linspace(1, 1 / 32, 32)
  if scheme == 'symmetric':
    return jnp.stack([steps, steps], axis=-1)
  pairs = jnp.meshgrid(steps, steps)
  return jnp.stack([x.ravel() for x in pairs], axis=-1)


@functools.partial(jax.jit, static_argnames=('axes', 'scheme', 'method'))
def _range(
  values: Array,
  counts: ArrayLike | float,
  low: Array,
  high: Array,
  axes: tuple[int, ...],
  scheme: str,
  method: str,
) -> Range:
  """A `Range` within [low, high].

  With `least_squares` it is the one of least squared error, by grid search;
  else it is [low, high].

  Args:
    values: any shape.
    counts: weights of the squared errors; broadcast against the values.
    low: lower bound, with `axes` kept at size 1.
    high: upper bound, likewise.
    axes: axes of the values along which they share a range.
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
  weight: Shaped[Array, '...'],
  channel_axes: tuple[int, ...],
  method: str = 'least_squares',
  scheme: str = 'symmetric',
  percentile: float | int = 99.99,
  power: Num[ArrayLike, '...'] | float = 1.0,
) -> Range:
  """The range of a weight.

  Args:
    weight: any shape.
    channel_axes: axes with a scale for each index, in the symmetric scheme. In
      the asymmetric one, that of the NEMO paper, the tensor has one scale.
    method: one of METHODS.
    scheme: one of SCHEMES.
    percentile: for the method `percentile`, per cent of the values in range.
    power: for `least_squares`, the weight of each value's squared error;
      broadcasts against `weight`.
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
  # A single scale has no axes, as the weight may be used in several ranks.
  return table if keep else Range(*(jnp.ravel(column) for column in table))


def activation_range(
  low: Num[ArrayLike, ''] | float | np.floating,
  high: Num[ArrayLike, ''] | float | np.floating,
  counts: Num[ArrayLike, ' bins'],
  method: str = 'least_squares',
  percentile: float | int = 99.99,
) -> Range:
  """The affine range of an activation, one for the tensor.

  Args:
    low: the least value observed.
    high: the greatest.
    counts: histogram of observe.BINS bins between them, or a sum of several.
    method: one of METHODS.
    percentile: as for `weight_range`.
  """
  if not isinstance(counts, Tracer):
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
