"""Convolutions with the elementwise steps after them, as one kernel of a GPU.

XLA writes what a convolution sums up to memory, in float32, and reads it again
to scale, clip and round it. Here a tile of sums goes through these steps while
it is still in registers, so that only their results are written.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from nemo_jax.core.types import Array
from nemo_jax.quantization.backend import lowering

# Numbers of a tile's row that are multiplied at once.
_DEPTH = 64
# Channels are a multiple of it; in fewer, tiles would be too small.
_CHANNELS = 32
# Those of a first layer, once its strides are channels, of this.
_LEAST_CHANNELS = 16
# Addresses are counted in 32 bits.
_MOST_NUMBERS = 2**31


class Convolution(NamedTuple):
  """Of codes, which are whole numbers held in bfloat16."""

  images: Array  # [B, H, W, C]
  kernel: Array  # [h, w, C, N]
  strides: tuple[int, int]
  padding: tuple[tuple[int, int], tuple[int, int]]


class _Tile(NamedTuple):
  """The part of the outputs that one program of the kernel computes."""

  rows: int  # pixels
  columns: int  # channels
  warps: int


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
  strides,
) -> bool:
  """Whether there is a kernel for a convolution of such shapes."""
  *_, deep, channels = kernel
  return (
    (deep % _CHANNELS == 0 or lowering.has_few_channels(kernel, strides))
    and channels % _CHANNELS == 0
    and 0 < math.prod(out) < _MOST_NUMBERS
    and math.prod(images[:3]) * max(deep, _CHANNELS) < _MOST_NUMBERS
  )


def _deepened(convolution: Convolution) -> Convolution:
  """The same with channels enough for a tile."""
  if convolution.kernel.shape[2] % _CHANNELS == 0:
    return convolution
  images, kernel = lowering.strides_to_channels(*convolution)
  lacking = -kernel.shape[2] % _LEAST_CHANNELS
  images = jnp.pad(images, ((0, 0), (0, 0), (0, 0), (0, lacking)))
  kernel = jnp.pad(kernel, ((0, 0), (0, 0), (0, lacking), (0, 0)))
  return Convolution(images, kernel, (1, 1), ((0, 0), (0, 0)))


def nearest(x: Array) -> Array:
  """`jnp.round`, which the language of kernels lacks: ties go to even."""
  whole = x.astype(jnp.float32)
  low = jnp.floor(whole)
  rest = whole - low
  odd = low - 2 * jnp.floor(low / 2)
  up = (rest > 0.5) | ((rest == 0.5) & (odd == 1))
  return (low + up.astype(jnp.float32)).astype(x.dtype)


def maximum(x: Array, y: Array) -> Array:
  """`jnp.maximum`, which in a kernel would pass over NaN."""
  return jnp.where((x != x) | (y != y), x + y, jnp.maximum(x, y))


def minimum(x: Array, y: Array) -> Array:
  """`jnp.minimum`, likewise."""
  return jnp.where((x != x) | (y != y), x + y, jnp.minimum(x, y))


def _power_of_two(number: int, most: int) -> int:
  """The largest that divides a number, up to another power of two."""
  return math.gcd(number, most)


def _tile(convolution: Convolution, reads_images: bool) -> _Tile:
  """The fastest on an H200 for ResNet50's shapes, of some forty tried."""
  height, width, _, channels = convolution.kernel.shape
  if reads_images:  # waits for memory, so there should be many of them
    return _Tile(64, _power_of_two(channels, 64), 4)
  if height * width == 1 or channels % 128:
    return _Tile(128, _power_of_two(channels, 64), 4)
  return _Tile(128, 128, 8)


def _sums(convolution: Convolution, images_ref, kernel_ref, tile, rows, inside):
  """[rows, columns] float32: a tile of the convolution.

  Args:
    convolution: its shapes.
    images_ref: all images, flat.
    kernel_ref: [h w C, columns].
    tile: what to compute.
    rows: [rows] the pixels among all those of the outputs.
    inside: [rows] which of them exist, None if all do.
  """
  _, height, width, channels = convolution.images.shape
  taps = convolution.kernel.shape[1]
  (low, _), (left, _) = convolution.padding
  padded = any(map(any, convolution.padding))
  lines, columns = _sizes(convolution)
  # Neighbours in a row follow each other in memory.
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
  return tuple((n + sum(edges) - k) // s + 1 for n, k, s, edges in sides)


def convolve(
  convolutions: Sequence[Convolution],
  tail: Callable[[list[Array], list[Array]], list[Array]],
  operands: Sequence[Array],
  dtypes: Sequence[jnp.dtype],
  interpret: bool = False,
) -> list[Array]:
  """What elementwise steps make of convolutions of one shape of output.

  Args:
    convolutions: one or more; see `suits`.
    tail: (sums, operands) -> outputs, all of them tiles [rows, columns].
    operands: what it reads beside the sums: one number [1], one for each
      channel [N], or one for each output [B, H, W, N].
    dtypes: of the outputs.
    interpret: runs on a CPU, slowly.

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
    mask = jnp.broadcast_to(inside[:, None], whole) if partial else None
    # Before the sums, so that memory has something to do meanwhile.
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
    # Tiles of the same pixels follow each other, while these are in the cache.
    grid=(channels // tile.columns, pl.cdiv(pixels, tile.rows)),
    in_specs=specs,
    out_specs=[block] * len(dtypes),
    out_shape=[jax.ShapeDtypeStruct((pixels, channels), d) for d in dtypes],
    compiler_params=triton.CompilerParams(num_warps=tile.warps, num_stages=3),
    interpret=interpret,
  )(*arrays)
  return [x.reshape(shape) for x in outputs]
