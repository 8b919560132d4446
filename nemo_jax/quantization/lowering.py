"""Matrix products of codes, in the form that a backend runs fastest.

XLA's convolution on CPUs is slow where there is a filter for each channel (a
tenth of what the arithmetic takes) or for each group of them (a fifth), or
where there are few channels (a third), and does a 1 x 1 convolution slower than
the matrix product that it is. All are rewritten there. Other backends run
products as traced, on bfloat16 where the codes have at most eight bits: it
holds whole numbers up to 256, and sums of its products are exact in float32
up to 2^24.
"""

import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from nemo_jax.base import Array
from nemo_jax.quantization import program as program_lib

# Codes of so many bits, less their zero point, are exact in bfloat16.
NARROW_BITS = 8
# Images NHWC, kernels HWIO, outputs NHWC, which is Flax's layout.
_LAYOUT = ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
# A convolution for each of more groups would swell the program.
_MOST_GROUPS = 64
# And so would a sum of many more terms than the 27 of a usual first layer.
_MOST_TERMS = 32


def _rewritable(params, kernel: Array) -> bool:
  plain = (1, 1)
  return (
    kernel.ndim == 4
    and tuple(params['dimension_numbers']) == _LAYOUT
    and params['lhs_dilation'] == plain
    and params['rhs_dilation'] == plain
    and params['batch_group_count'] == 1
    and all(low >= 0 and high >= 0 for low, high in params['padding'])
  )


def _pad(images: Array, padding) -> Array:
  edges = ((0, 0), *padding, (0, 0))
  return jnp.pad(images, edges) if any(map(any, padding)) else images


def _taps(images: Array, window, strides):
  """(i, j, what a convolution multiplies with its tap there), one by one."""
  spans = [
    size - taps + 1
    for size, taps in zip(images.shape[1:3], window, strict=True)
  ]
  for i, j in itertools.product(*map(range, window)):
    rows = slice(i, i + spans[0], strides[0])
    columns = slice(j, j + spans[1], strides[1])
    yield i, j, images[:, rows, columns]


def depthwise(
  images: Array, kernel: Array, strides, padding, narrow: bool = False
) -> Array:
  """A depthwise convolution as a sum of shifted and scaled images.

  Args:
    images: [B, H, W, C].
    kernel: [h, w, 1, C].
    strides: of the window.
    padding: pairs of low and high, for H and W.
    narrow: images hold whole numbers of at most 16 bits.
  """
  dtype = images.dtype
  if narrow:
    # Memory is what it waits for. Without the barrier XLA would compute the
    # codes anew for each tap.
    images = _pad(images.astype(jnp.int16), padding)
    images = jax.lax.optimization_barrier(images)
  else:
    images = _pad(images, padding)
  total = 0
  for i, j, part in _taps(images, kernel.shape[:2], strides):
    total += part.astype(dtype) * kernel[i, j, 0]
  return total


def shallow(
  images: Array, kernel: Array, strides, padding, narrow: bool = False
) -> Array:
  """A convolution of few channels, likewise; arguments as for `depthwise`."""
  del narrow
  total = 0
  for i, j, part in _taps(_pad(images, padding), kernel.shape[:2], strides):
    for c in range(kernel.shape[2]):
      total += part[..., c : c + 1] * kernel[i, j, c]
  return total


def pointwise(
  images: Array, kernel: Array, strides, padding, narrow: bool = False
) -> Array:
  """A 1 x 1 convolution as a matrix product; arguments as for `depthwise`."""
  del narrow
  images = _pad(images, padding)[:, :: strides[0], :: strides[1]]
  return jnp.dot(images, kernel[0, 0])


def grouped(
  images: Array, kernel: Array, strides, padding, narrow: bool = False
) -> Array:
  """A grouped convolution as one of its own for each group.

  Args:
    images: [B, H, W, G c].
    kernel: [h, w, c, C], the outputs of a group together.
    strides: of the window.
    padding: pairs of low and high, for H and W.
    narrow: ignored.
  """
  del narrow
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


def _rewritten(params, images: Array, kernel: Array):
  """The function above that does what a convolution does; None if none."""
  if not _rewritable(params, kernel):
    return None
  groups = params['feature_group_count']
  if groups == images.shape[-1] == kernel.shape[-1] > 1:
    return depthwise
  if groups == 1 and kernel.shape[:2] == (1, 1):
    return pointwise
  if groups == 1 and math.prod(kernel.shape[:3]) <= _MOST_TERMS:
    return shallow
  return grouped if 1 < groups <= _MOST_GROUPS else None


def as_traced(
  equation: program_lib.Equation, operands: list[Array], narrow: bool = False
) -> Array:
  """The product that an equation is, its sums at least in float32.

  Args:
    equation: one of `program.MATRIX_PRODUCTS`.
    operands: its two inputs.
    narrow: ignored here.
  """
  del narrow
  dtype = jnp.result_type(*operands)
  (out,) = program_lib.bind(equation, operands, preferred_element_type=dtype)
  return out


def _narrow(equation, operands: list[Array]) -> Array:
  """As traced, on bfloat16 operands with sums in float32."""
  (out,) = program_lib.bind(
    equation,
    [x.astype(jnp.bfloat16) for x in operands],
    preferred_element_type=jnp.float32,
    precision=None,
  )
  return out


def for_backend(
  equation: program_lib.Equation, operands: list[Array], narrow: bool = False
) -> Array:
  """The product that an equation is, by the fastest of its forms.

  Args:
    equation: one of `program.MATRIX_PRODUCTS`.
    operands: its two inputs.
    narrow: they hold whole numbers from -256 to 256.
  """
  plain = lambda *operands: as_traced(equation, operands)
  rewritten = None
  if equation.name == 'conv_general_dilated':
    rewritten = _rewritten(equation.params, *operands)
  if rewritten is None and not narrow:
    return plain(*operands)
  other = (lambda *operands: _narrow(equation, operands)) if narrow else plain
  fast = plain
  if rewritten is not None:
    window = equation.params['window_strides'], equation.params['padding']
    fast = lambda images, kernel: rewritten(images, kernel, *window, narrow)
  return jax.lax.platform_dependent(*operands, cpu=fast, default=other)


LOWERINGS: dict[str, Callable[..., Array]] = {
  'traced': as_traced,
  'backend': for_backend,
}
