"""Convolutions fused with the elementwise operations after them, for GPUs.

XLA writes the sums of a convolution to memory in float32, and reads them again
to scale, clip and round them. Here these operations are applied to a tile of
sums while it is in registers, so that only their results are written.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Shaped

from nemo_jax.core.types import Array, ArrayLike
from nemo_jax.quantization.backend import convolutions as forms

# Most values of a row of a tile that are multiplied at once.
_DEPTH = 64
# Channels have to be a multiple of this; with fewer, tiles would be too small.
_CHANNELS = 32
# Those of a first layer, after `strides_to_channels`, of this.
_LEAST_CHANNELS = 16
# Most elements of an array, as addresses have 32 bits.
_MOST_NUMBERS = 2**31


class Convolution(NamedTuple):
  """A convolution of codes, which are integers in bfloat16."""

  images: Shaped[Array, 'B H W C']
  kernel: Shaped[Array, 'h w C N']
  strides: tuple[int, int]
  padding: tuple[tuple[int, int], tuple[int, int]]


class _Tile(NamedTuple):
  """Size of the part of the outputs that one program of the kernel computes."""

  rows: int  # pixels
  columns: int  # channels
  warps: int  # that compute it


def available() -> bool:
  """Whether this machine's GPU has matrix units for bfloat16."""
  device = jax.devices()[0]
  return 'NVIDIA' in device.device_kind and (
    float(device.compute_capability) >= 8
  )


def suits(
  images: tuple[int, ...],
  kernel: tuple[int, ...],
  out: tuple[int, ...],
  strides: Sequence[int],
) -> bool:
  """Whether there is a kernel for a convolution of these shapes.

  Args:
    images: shape [B, H, W, C].
    kernel: shape [h, w, C, N].
    out: shape of the outputs.
    strides: of the window.
  """
  *_, deep, channels = kernel
  return (
    (deep % _CHANNELS == 0 or forms.has_few_channels(kernel, strides))
    and channels % _CHANNELS == 0
    and 0 < math.prod(out) < _MOST_NUMBERS
    and math.prod(images[:3]) * max(deep, _CHANNELS) < _MOST_NUMBERS
  )


def _deepened(convolution: Convolution) -> Convolution:
  """The same convolution with enough channels for a tile."""
  if convolution.kernel.shape[2] % _CHANNELS == 0:
    return convolution
  images, kernel = forms.strides_to_channels(*convolution)
  lacking = -kernel.shape[2] % _LEAST_CHANNELS
  images = jnp.pad(images, ((0, 0), (0, 0), (0, 0), (0, lacking)))
  kernel = jnp.pad(kernel, ((0, 0), (0, 0), (0, lacking), (0, 0)))
  return Convolution(images, kernel, (1, 1), ((0, 0), (0, 0)))


def nearest(x: Any) -> Any:
  """Nearest integers, ties to even: `jnp.round`, which kernels lack.

  Operands here and below are arrays or NumPy's numbers, also of bfloat16.
  """
  whole = x.astype(jnp.float32)
  low = jnp.floor(whole)
  rest = whole - low
  odd = low - 2 * jnp.floor(low / 2)
  up = (rest > 0.5) | ((rest == 0.5) & (odd == 1))
  return (low + up.astype(jnp.float32)).astype(x.dtype)


def maximum(x: Any, y: Any) -> Array:
  """`jnp.maximum`, which in a kernel would ignore NaN."""
  return jnp.where((x != x) | (y != y), x + y, jnp.maximum(x, y))


def minimum(x: Any, y: Any) -> Array:
  """`jnp.minimum`, which in a kernel would ignore NaN."""
  return jnp.where((x != x) | (y != y), x + y, jnp.minimum(x, y))


def _power_of_two(number: int, most: int) -> int:
  """The largest power of two that divides a number, at most `most`."""
  return math.gcd(number, most)


def _tile(convolution: Convolution, reads_images: bool) -> _Tile:
  """The tile that was fastest for ResNet50 on an H200, of forty tried."""
  height, width, _, channels = convolution.kernel.shape
  if reads_images:  # memory limits the speed, so there should be many tiles
    return _Tile(64, _power_of_two(channels, 64), 4)
  if height * width == 1 or channels % 128:
    return _Tile(128, _power_of_two(channels, 64), 4)
  return _Tile(128, 128, 8)


def _sums(
  convolution: Convolution,
  images_ref: Any,
  kernel_ref: Any,
  tile: _Tile,
  rows: Array,
  inside: Array | None,
) -> Array:
  """The sums of a tile of a convolution, float32[rows, columns].

  Args:
    convolution: gives the shapes.
    images_ref: reference to all images, flat.
    kernel_ref: reference to the kernel [h w C, columns].
    tile: size of the tile.
    rows: int32[rows], indices of its pixels among those of all outputs.
    inside: bool[rows], which of them exist; None if all do.
  """
  _, height, width, channels = convolution.images.shape
  taps = convolution.kernel.shape[1]
  (low, _), (left, _) = convolution.padding
  padded = any(map(any, convolution.padding))
  lines, columns = _sizes(convolution)
  # The taps of a row of the window follow each other in memory.
  depth = _power_of_two(channels if padded else taps * channels, _DEPTH)
  parts = taps * channels // depth
  image, place = (f(rows, lines * columns) for f in (jax.lax.div, jax.lax.rem))
  top = jax.lax.div(place, columns) * convolution.strides[0] - low
  start = jax.lax.rem(place, columns) * convolution.strides[1] - left
  along = jnp.arange(depth, dtype=jnp.int32)

  def step(index, total):
    line, part = jax.lax.div(index, parts), jax.lax.rem(index, parts)
    y, x = top + line, start + jax.lax.div(part * depth, channels)
    at = ((image * height + y) * width + start) * channels + part * depth
    valid = inside
    if padded:
      valid = (y >= 0) & (y < height) & (x >= 0) & (x < width)
      valid = valid if inside is None else valid & inside
    view = images_ref.at[at[:, None] + along[None, :]]
    if valid is None:
      codes = triton.load(view)
    else:
      mask = jnp.broadcast_to(valid[:, None], (tile.rows, depth))
      codes = triton.load(view, mask=mask, other=jnp.bfloat16(0))
    weights = kernel_ref[pl.ds(index * depth, depth), :]
    return total + jax.lax.dot(
      codes, weights, preferred_element_type=jnp.float32
    )

  zeros = jnp.zeros((tile.rows, tile.columns), jnp.float32)
  steps = convolution.kernel.shape[0] * parts
  return jax.lax.fori_loop(0, steps, step, zeros)


def _sizes(convolution: Convolution) -> tuple[int, int]:
  """Height and width of the outputs."""
  sides = zip(
    convolution.images.shape[1:3],
    convolution.kernel.shape[:2],
    convolution.strides,
    convolution.padding,
    strict=True,
  )
  height, width = ((n + sum(edges) - k) // s + 1 for n, k, s, edges in sides)
  return height, width


def convolve(
  convolutions: Sequence[Convolution],
  tail: Callable[[list[Array], list[Array]], list[Array]],
  operands: Sequence[ArrayLike],
  dtypes: Sequence[Any],
  interpret: bool = False,
) -> list[Array]:
  """Elementwise operations on the sums of convolutions, as one kernel.

  Args:
    convolutions: one or more with outputs of the same shape; see `suits`.
    tail: (sums, operands) -> outputs, all of them tiles [rows, columns].
    operands: other operands of the tail: one number [1], one for each channel
      [N], or one for each output [B, H, W, N].
    dtypes: types of the outputs.
    interpret: whether to run on a CPU, slowly.

  Returns:
    One array [B, H, W, N] for each of `dtypes`.
  """
  convolutions = [_deepened(convolution) for convolution in convolutions]
  first = convolutions[0]
  count, channels = len(first.images), first.kernel.shape[-1]
  shape = (count, *_sizes(first), channels)
  pixels = math.prod(shape[:3])
  tile = _tile(first, any(x.ndim > 1 for x in operands))
  block = pl.BlockSpec((tile.rows, tile.columns), lambda n, m: (m, n))
  partial = pixels % tile.rows

  def body(*refs):
    given = 2 * len(convolutions)
    rows = pl.program_id(1) * tile.rows + jnp.arange(tile.rows, dtype=jnp.int32)
    inside = rows < pixels if partial else None
    whole = (tile.rows, tile.columns)
    mask = None
    if inside is not None:
      mask = jnp.broadcast_to(inside[:, None], whole)
    # Loaded before the sums, so that memory is read while these are computed.
    beside = [
      triton.load(ref, mask=mask) if x.ndim > 1 else ref[...]
      for x, ref in zip(operands, refs[given:], strict=False)
    ]
    sums = [
      _sums(convolution, *refs[2 * i : 2 * i + 2], tile, rows, inside)
      for i, convolution in enumerate(convolutions)
    ]
    outputs = tail(sums, [jnp.broadcast_to(x, whole) for x in beside])
    for ref, out in zip(refs[given + len(operands) :], outputs, strict=True):
      triton.store(ref, out.astype(ref.dtype), mask=mask)

  specs, arrays = [], []
  for convolution in convolutions:
    kernel = convolution.kernel.reshape(-1, channels)
    size = convolution.images.size
    specs += [
      pl.BlockSpec((size,), lambda n, m: (0,)),
      pl.BlockSpec((len(kernel), tile.columns), lambda n, m: (0, n)),
    ]
    arrays += [convolution.images.reshape(-1), kernel]
  for x in operands:
    if x.ndim > 1:
      specs.append(block)
      arrays.append(x.reshape(pixels, channels))
    elif x.size == 1:
      specs.append(pl.BlockSpec((1,), lambda n, m: (0,)))
      arrays.append(x)
    else:
      specs.append(pl.BlockSpec((tile.columns,), lambda n, m: (n,)))
      arrays.append(x)
  outputs = pl.pallas_call(
    body,
    # Tiles of the same pixels follow each other while these are in the cache.
    grid=(channels // tile.columns, pl.cdiv(pixels, tile.rows)),
    in_specs=specs,
    out_specs=[block] * len(dtypes),
    out_shape=[jax.ShapeDtypeStruct((pixels, channels), d) for d in dtypes],
    compiler_params=triton.CompilerParams(num_warps=tile.warps, num_stages=3),
    interpret=interpret,
  )(*arrays)
  return [x.reshape(shape) for x in outputs]
