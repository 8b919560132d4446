"""Matrix products of codes, in the form that each platform runs fastest.

On CPUs, XLA's convolution reaches a tenth of the speed of the arithmetic where
there is a filter for each channel, a fifth where there is one for each group of
channels, and a third where there are few channels; and a 1 x 1 convolution is
slower than the matrix product that it is equal to. All four are rewritten.

On other platforms, codes of at most eight bits are multiplied in bfloat16,
which holds integers up to 256 exactly; sums of their products are exact in
float32 while they stay within 2^24. On GPUs, of these, convolutions with a
filter for each channel, 1 x 1 convolutions, and those with strides over few
channels are rewritten. Wider codes are multiplied at the highest precision, as
matrix units would round them by default.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from nemo_jax.core.types import Array, ArrayLike
from nemo_jax.quantization.backend.convolutions import (
  depthwise,
  grouped,
  has_few_channels,
  hold_in_sixteen_bits,
  is_plain_convolution,
  pointwise,
  shallow,
  space_to_depth,
)
from nemo_jax.quantization.trace.equations import Equation, bind

# With more groups, a convolution for each would make the program too large.
_MOST_GROUPS = 64
# So would a sum of many more terms than the 27 of a usual first layer.
_MOST_TERMS = 32


def _rewritten(
  equation: Equation, images: ArrayLike, kernel: ArrayLike, narrow: bool
) -> dict[str, Callable[..., Any]]:
  """Functions of `convolutions` for an equation's product, by platform.

  Args:
    equation: a product.
    images: its first operand; images if it is a convolution.
    kernel: its second operand.
    narrow: as for `for_backend`.
  """
  if not is_plain_convolution(equation):
    return {}
  groups = equation.params['feature_group_count']
  strides = equation.params['window_strides']
  if groups == images.shape[-1] == kernel.shape[-1] > 1:
    hold = {'hold': hold_in_sixteen_bits} if narrow else {}
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
  equation: Equation, operands: Sequence[ArrayLike], narrow: bool = False
) -> Array:
  """The product of an equation, computed as it was traced.

  Args:
    equation: one of `equations.MATRIX_PRODUCTS`.
    operands: its two inputs.
    narrow: not used; see `for_backend`.
  """
  del narrow
  dtype = jnp.result_type(*operands)
  (out,) = bind(equation, operands, preferred_element_type=dtype)
  return out


def _window(equation: Equation) -> tuple[Any, Any]:
  """Strides and padding of a convolution."""
  return equation.params['window_strides'], equation.params['padding']


def of_codes(equation: Equation, operands: Sequence[ArrayLike]) -> Array:
  """The product as traced, of integers in bfloat16 with sums in float32.

  Arguments as for `as_traced`.
  """
  operands = [x.astype(jnp.bfloat16) for x in operands]
  (out,) = bind(
    equation, operands, preferred_element_type=jnp.float32, precision=None
  )
  return out


def of_codes_on_gpu(equation: Equation, operands: Sequence[ArrayLike]) -> Array:
  """The product of `of_codes` in the form that is fastest on a GPU."""
  form = _rewritten(equation, *operands, narrow=True).get('gpu')
  if form is None:
    return of_codes(equation, operands)
  images, kernel = (x.astype(jnp.bfloat16) for x in operands)
  return form(images, kernel, *_window(equation))


def _precisely(equation: Equation, operands: Sequence[ArrayLike]) -> Array:
  """The product as traced, without matrix units rounding the operands."""
  (out,) = bind(
    equation,
    operands,
    preferred_element_type=jnp.result_type(*operands),
    precision=(jax.lax.Precision.HIGHEST,) * 2,
  )
  return out


def _fastest(
  equation: Equation, operands: Sequence[ArrayLike], narrow: bool
) -> Array:
  """The product in the fastest form for the platform that it is compiled for.

  Arguments as for `for_backend`.
  """
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
  equation: Equation, operands: Sequence[ArrayLike], narrow: bool = False
) -> Array:
  """The product of an equation, in the fastest form for the platform.

  Args:
    equation: one of `equations.MATRIX_PRODUCTS`.
    operands: its two inputs.
    narrow: whether they hold integers from -256 to 256.
  """
  any_numbers = lambda *operands: _fastest(equation, operands, narrow=False)
  if not narrow:
    return any_numbers(*operands)
  # Gradients are not integers, so they are multiplied as any numbers.
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
