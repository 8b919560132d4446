"""Convolutions of NHWC images in other forms, which compute the same sums."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Shaped

from nemo_jax.core.types import Array, ArrayLike
from nemo_jax.quantization.trace.equations import Equation

# Layouts of images NHWC, kernels HWIO and outputs NHWC, which are Flax's.
_LAYOUT = ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
# Most channels that count as few; a matrix unit needs eight or more.
_FEW_CHANNELS = 4


def is_plain_convolution(equation: Equation) -> bool:
  """Whether it is a convolution of NHWC images without dilation.

  It may have strides, groups and padding that is not negative.
  """
  if equation.name != 'conv_general_dilated':
    return False
  params, undilated = equation.params, (1, 1)
  return (
    tuple(params['dimension_numbers']) == _LAYOUT
    and params['lhs_dilation'] == undilated
    and params['rhs_dilation'] == undilated
    and params['batch_group_count'] == 1
    and all(low >= 0 and high >= 0 for low, high in params['padding'])
  )


def has_few_channels(kernel: Sequence[int], strides: Sequence[int]) -> bool:
  """Whether a convolution has few channels and strides, see `space_to_depth`.

  Args:
    kernel: shape [h, w, C, N].
    strides: of the window.
  """
  return kernel[2] <= _FEW_CHANNELS and max(strides) > 1


def _dtype_of_sums(kernel: ArrayLike) -> Any:
  """Type in which products are summed: float32 or wider."""
  return jnp.promote_types(kernel.dtype, jnp.float32)


def _pad(images: ArrayLike, padding: Sequence[tuple[int, int]]) -> ArrayLike:
  """Images padded with zeros along H and W."""
  edges = ((0, 0), *padding, (0, 0))
  return jnp.pad(images, edges) if any(map(any, padding)) else images


def _taps(
  images: ArrayLike, window: Sequence[int], strides: Sequence[int]
) -> Iterator[tuple[int, int, Any]]:
  """(i, j, the pixels that a convolution multiplies with tap [i, j])."""
  spans = [
    size - taps + 1
    for size, taps in zip(images.shape[1:3], window, strict=True)
  ]
  for i, j in itertools.product(*map(range, window)):
    rows = slice(i, i + spans[0], strides[0])
    columns = slice(j, j + spans[1], strides[1])
    yield i, j, images[:, rows, columns]


def depthwise(
  images: Shaped[ArrayLike, 'B H W C'],
  kernel: Shaped[ArrayLike, 'h w 1 C'],
  strides: Sequence[int],
  padding: Sequence[tuple[int, int]],
  hold: Callable[[Any], Any] = lambda images: images,
) -> Shaped[ArrayLike, 'B Y X C']:
  """A depthwise convolution as a sum of shifted and scaled images.

  Args:
    images: the images.
    kernel: one filter for each channel.
    strides: of the window.
    padding: pairs of low and high, for H and W.
    hold: padded images -> the form in which they are stored meanwhile.
  """
  total: Any = 0
  images = hold(_pad(images, padding))
  dtype = _dtype_of_sums(kernel)
  for i, j, part in _taps(images, kernel.shape[:2], strides):
    total += part.astype(dtype) * kernel[i, j, 0].astype(dtype)
  return total


def hold_in_sixteen_bits(images: Array) -> Array:
  """Codes of at most eight bits in half the memory.

  The speed of a CPU is limited by its memory here. Without the barrier XLA
  would compute the codes again for each tap.
  """
  return jax.lax.optimization_barrier(images.astype(jnp.bfloat16))


def shallow(
  images: Shaped[ArrayLike, 'B H W C'],
  kernel: Shaped[ArrayLike, 'h w C N'],
  strides: Sequence[int],
  padding: Sequence[tuple[int, int]],
) -> Shaped[ArrayLike, 'B Y X N']:
  """A convolution of few channels as a sum of shifted and scaled images.

  Arguments as for `depthwise`.
  """
  total: Any = 0
  for i, j, part in _taps(_pad(images, padding), kernel.shape[:2], strides):
    for c in range(kernel.shape[2]):
      total += part[..., c : c + 1] * kernel[i, j, c]
  return total


def _to_depth(array: ArrayLike, steps: Sequence[int]) -> Array:
  """[N, H, W, C] as [N, H / s, W / t, s t C], padded with zeros to fit."""
  (s, t), (count, height, width, channels) = steps, array.shape
  array = _pad(array, ((0, -height % s), (0, -width % t)))
  rows, columns = -(-height // s), -(-width // t)
  array = array.reshape(count, rows, s, columns, t, channels)
  return jnp.swapaxes(array, 2, 3).reshape(count, rows, columns, -1)


def strides_to_channels(
  images: Shaped[ArrayLike, 'B H W C'],
  kernel: Shaped[ArrayLike, 'h w C N'],
  strides: Sequence[int],
  padding: Sequence[tuple[int, int]],
) -> tuple[Shaped[Array, 'B y x D'], Shaped[Array, 'k l D N']]:
  """Operands of the same convolution without strides and padding.

  The pixels of a step of the window become channels, so that a first layer has
  enough channels for a matrix unit. Arguments as for `depthwise`.
  """
  images = _pad(images, padding)
  sizes = [
    (images.shape[axis + 1] - kernel.shape[axis]) // strides[axis] + 1
    for axis in (0, 1)
  ]
  images = _to_depth(images, strides)
  kernel = jnp.moveaxis(_to_depth(jnp.moveaxis(kernel, -1, 0), strides), 0, -1)
  rows, columns = (
    size + taps - 1 for size, taps in zip(sizes, kernel.shape[:2], strict=True)
  )
  return images[:, :rows, :columns], kernel


def space_to_depth(
  images: Shaped[ArrayLike, 'B H W C'],
  kernel: Shaped[ArrayLike, 'h w C N'],
  strides: Sequence[int],
  padding: Sequence[tuple[int, int]],
) -> Shaped[Array, 'B Y X N']:
  """A convolution by `strides_to_channels`; arguments as for `depthwise`."""
  return jax.lax.conv_general_dilated(
    *strides_to_channels(images, kernel, strides, padding),
    (1, 1),
    'VALID',
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    preferred_element_type=_dtype_of_sums(kernel),
  )


def pointwise(
  images: Shaped[ArrayLike, 'B H W C'],
  kernel: Shaped[ArrayLike, '1 1 C N'],
  strides: Sequence[int],
  padding: Sequence[tuple[int, int]],
) -> Shaped[Array, 'B Y X N']:
  """A 1 x 1 convolution as a matrix product; arguments as for `depthwise`."""
  images = _pad(images, padding)[:, :: strides[0], :: strides[1]]
  dtype = _dtype_of_sums(kernel)
  return jnp.dot(images, kernel[0, 0], preferred_element_type=dtype)


def grouped(
  images: Shaped[ArrayLike, 'B H W C'],
  kernel: Shaped[ArrayLike, 'h w c N'],
  strides: Sequence[int],
  padding: Sequence[tuple[int, int]],
) -> Shaped[Array, 'B Y X N']:
  """A grouped convolution as a convolution for each group.

  Args:
    images: their C channels are those of C / c groups.
    kernel: the outputs of a group lie next to each other.
    strides: of the window.
    padding: pairs of low and high, for H and W.
  """
  groups = images.shape[-1] // kernel.shape[2]
  parts = zip(
    jnp.split(images, groups, axis=-1),
    jnp.split(kernel, groups, axis=-1),
    strict=True,
  )
  layout = ('NHWC', 'HWIO', 'NHWC')
  return jnp.concatenate(
    [
      jax.lax.conv_general_dilated(
        *part, strides, padding, dimension_numbers=layout
      )
      for part in parts
    ],
    axis=-1,
  )
