"""Matrix products of codes, in the form that a backend runs fastest.

XLA's convolution on CPUs is slow where there is a filter for each channel (a
tenth of what the arithmetic takes) or for each group of them (a fifth), or
where there are few channels (a third), and does a 1 x 1 convolution slower than
the matrix product that it is. All are rewritten there. Codes of at most eight
bits are handed to other backends in bfloat16, which holds whole numbers up to
256; sums of their products are exact in float32 while they stay within 2^24.
Of them GPUs get rewritten what has a filter for each channel, what is 1 x 1,
and what strides over few channels. Wider codes are multiplied at the highest
precision, for the default of matrix units would round them.
"""

import functools
import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from nemo_jax.core.types import Array
from nemo_jax.quantization.trace import program as program_lib

# Images NHWC, kernels HWIO, outputs NHWC, which is Flax's layout.
_LAYOUT = ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
# A convolution for each of more groups would swell the program.
_MOST_GROUPS = 64
# And so would a sum of many more terms than the 27 of a usual first layer.
_MOST_TERMS = 32
# Pixels have so many at most; a matrix unit wants eight or more.
_FEW_CHANNELS = 4


def is_plain_convolution(equation: program_lib.Equation) -> bool:
  """Whether it is one of images by what slides over them, perhaps in groups."""
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


def has_few_channels(kernel: tuple[int, ...], strides) -> bool:
  """Whether strides should become channels."""
  return kernel[2] <= _FEW_CHANNELS and max(strides) > 1


def _dtype_of_sums(kernel: Array):
  """At least float32, whatever the products are of."""
  return jnp.promote_types(kernel.dtype, jnp.float32)


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
  images: Array, kernel: Array, strides, padding, hold=lambda images: images
) -> Array:
  """A depthwise convolution as a sum of shifted and scaled images.

  Args:
    images: [B, H, W, C].
    kernel: [h, w, 1, C].
    strides: of the window.
    padding: pairs of low and high, for H and W.
    hold: makes of the padded images what they wait as.
  """
  images, total = hold(_pad(images, padding)), 0
  dtype = _dtype_of_sums(kernel)
  for i, j, part in _taps(images, kernel.shape[:2], strides):
    total += part.astype(dtype) * kernel[i, j, 0].astype(dtype)
  return total


def _in_sixteen_bits(images: Array) -> Array:
  """Codes of at most eight bits in half the memory, which a CPU waits for.

  Without the barrier XLA would compute the codes anew for each tap.
  """
  return jax.lax.optimization_barrier(images.astype(jnp.bfloat16))


def shallow(images: Array, kernel: Array, strides, padding) -> Array:
  """A convolution of few channels, likewise; arguments as for `depthwise`."""
  total = 0
  for i, j, part in _taps(_pad(images, padding), kernel.shape[:2], strides):
    for c in range(kernel.shape[2]):
      total += part[..., c : c + 1] * kernel[i, j, c]
  return total


def _to_depth(array: Array, steps) -> Array:
  """[N, H, W, C] as [N, H / s, W / t, s t C], zeros where it falls short."""
  (s, t), (count, height, width, channels) = steps, array.shape
  array = _pad(array, ((0, -height % s), (0, -width % t)))
  rows, columns = -(-height // s), -(-width // t)
  array = array.reshape(count, rows, s, columns, t, channels)
  return jnp.swapaxes(array, 2, 3).reshape(count, rows, columns, -1)


def strides_to_channels(
  images: Array, kernel: Array, strides, padding
) -> tuple[Array, Array]:
  """Operands of a convolution with neither strides nor padding, but the same.

  Arguments as for `depthwise`. The pixels that a stride passes over become
  channels, so that a first layer has enough of them for a matrix unit.
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


def space_to_depth(images: Array, kernel: Array, strides, padding) -> Array:
  """A convolution by `strides_to_channels`; arguments as for `depthwise`."""
  return jax.lax.conv_general_dilated(
    *strides_to_channels(images, kernel, strides, padding),
    (1, 1),
    'VALID',
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    preferred_element_type=_dtype_of_sums(kernel),
  )


def pointwise(images: Array, kernel: Array, strides, padding) -> Array:
  """A 1 x 1 convolution as a matrix product; arguments as for `depthwise`."""
  images = _pad(images, padding)[:, :: strides[0], :: strides[1]]
  dtype = _dtype_of_sums(kernel)
  return jnp.dot(images, kernel[0, 0], preferred_element_type=dtype)


def grouped(images: Array, kernel: Array, strides, padding) -> Array:
  """A grouped convolution as one of its own for each group.

  Args:
    images: [B, H, W, G c].
    kernel: [h, w, c, C], the outputs of a group together.
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


def _rewritten(equation, images: Array, kernel: Array, narrow: bool):
  """The functions above that do what an equation does, by platform.

  Args:
    equation: a product.
    images: its first operand, if it is a convolution.
    kernel: its second.
    narrow: as for `for_backend`.
  """
  if not is_plain_convolution(equation):
    return {}
  groups = equation.params['feature_group_count']
  strides = equation.params['window_strides']
  if groups == images.shape[-1] == kernel.shape[-1] > 1:
    hold = {'hold': _in_sixteen_bits} if narrow else {}
    return {'cpu': functools.partial(depthwise, **hold), 'gpu': depthwise}
  if groups == 1 and kernel.shape[:2] == (1, 1):
    return {'cpu': pointwise, 'gpu': pointwise}
  if groups > 1:
    return {'cpu': grouped} if groups <= _MOST_GROUPS else {}
  forms = {}
  if math.prod(kernel.shape[:3]) <= _MOST_TERMS:
    forms['cpu'] = shallow
  if has_few_channels(kernel.shape, strides):
    forms['gpu'] = space_to_depth
  return forms


def as_traced(
  equation: program_lib.Equation, operands: list[Array], narrow: bool = False
) -> Array:
  """The product that an equation is.

  Args:
    equation: one of `program.MATRIX_PRODUCTS`.
    operands: its two inputs.
    narrow: ignored here.
  """
  del narrow
  dtype = jnp.result_type(*operands)
  (out,) = program_lib.bind(equation, operands, preferred_element_type=dtype)
  return out


def _window(equation):
  return equation.params['window_strides'], equation.params['padding']


def of_codes(equation: program_lib.Equation, operands: list[Array]) -> Array:
  """The product as traced, of whole numbers in bfloat16; sums in float32.

  Arguments as for `as_traced`.
  """
  operands = [x.astype(jnp.bfloat16) for x in operands]
  (out,) = program_lib.bind(
    equation, operands, preferred_element_type=jnp.float32, precision=None
  )
  return out


def of_codes_on_gpu(equation, operands: list[Array]) -> Array:
  """The same in the form that is fastest on a GPU."""
  form = _rewritten(equation, *operands, narrow=True).get('gpu')
  if form is None:
    return of_codes(equation, operands)
  images, kernel = (x.astype(jnp.bfloat16) for x in operands)
  return form(images, kernel, *_window(equation))


def _precisely(equation, operands: list[Array]) -> Array:
  """As traced, without the rounding of operands that matrix units like."""
  (out,) = program_lib.bind(
    equation,
    operands,
    preferred_element_type=jnp.result_type(*operands),
    precision=(jax.lax.Precision.HIGHEST,) * 2,
  )
  return out


def _fastest(equation, operands: list[Array], narrow: bool) -> Array:
  form = _rewritten(equation, *operands, narrow).get('cpu')
  dtype = jnp.float32 if narrow else jnp.result_type(*operands)

  def on_cpu(equation, operands):
    if form is None:
      return as_traced(equation, operands)
    return form(*operands, *_window(equation))

  def by(product):
    return lambda *operands: product(equation, operands).astype(dtype)

  on_gpu = by(of_codes_on_gpu if narrow else _precisely)
  elsewhere = by(of_codes if narrow else _precisely)
  return jax.lax.platform_dependent(
    *operands, cpu=by(on_cpu), cuda=on_gpu, rocm=on_gpu, default=elsewhere
  )


def for_backend(
  equation: program_lib.Equation, operands: list[Array], narrow: bool = False
) -> Array:
  """The product that an equation is, by the fastest of its forms.

  Args:
    equation: one of `program.MATRIX_PRODUCTS`.
    operands: its two inputs.
    narrow: they hold whole numbers from -256 to 256.
  """
  any_numbers = lambda *operands: _fastest(equation, operands, narrow=False)
  if not narrow:
    return any_numbers(*operands)
  # Gradients are not whole numbers.
  product = jax.custom_jvp(
    lambda *operands: _fastest(equation, operands, narrow=True)
  )

  @product.defjvp
  def differentiate(primals, tangents):
    _, tangent = jax.jvp(any_numbers, primals, tangents)
    return product(*primals), tangent

  return product(*operands)


LOWERINGS: dict[str, Callable[..., Array]] = {
  'traced': as_traced,
  'backend': for_backend,
}
