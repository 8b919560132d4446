"""Units of a program: the equations that one kernel can compute together."""

import math

import jax
import jax.numpy as jnp

from nemo_jax.quantization.backend import kernels
from nemo_jax.quantization.backend.convolutions import is_plain_convolution
from nemo_jax.quantization.trace.equations import MATRIX_PRODUCTS, Equation
from nemo_jax.quantization.trace.program import Program

# Elementwise primitives that a kernel computes bit-equal to XLA. Quotients and
# exponentials of a kernel would differ.
ELEMENTWISE = (
  'abs',
  'add',
  'add_any',
  'clamp',
  'convert_element_type',
  'max',
  'min',
  'mul',
  'neg',
  'round',
  'sub',
)
# The sums of more convolutions would not fit in the registers.
_MOST_CONVOLUTIONS = 2


def output_shape(equation: Equation) -> tuple[int, ...]:
  """The shape of an equation's first output."""
  return equation.out_avals[0].shape


def _fits(given: tuple[int, ...], shape: tuple[int, ...]) -> bool:
  """Whether an operand is one number, or one for each channel or output."""
  return (
    given == shape
    or math.prod(given) == 1
    or (given[-1:] == shape[-1:] == (math.prod(given),))
  )


def _is_elementwise(equation: Equation) -> bool:
  """Whether a kernel can compute an equation, if its operands fit."""
  to_even = jax.lax.RoundingMethod.TO_NEAREST_EVEN
  return (
    equation.name in ELEMENTWISE
    and equation.params.get('rounding_method', to_even) == to_even
    and jnp.issubdtype(equation.out_avals[0].dtype, jnp.floating)
  )


def is_narrow_product(equation: Equation) -> bool:
  """Whether it is a product in bfloat16 that is summed in float32."""
  dtypes = [aval.dtype for aval in (*equation.in_avals, *equation.out_avals)]
  return equation.name in MATRIX_PRODUCTS and (
    dtypes == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
  )


def _has_kernel(equation: Equation) -> bool:
  """Whether there is a kernel for an equation, which is a convolution then."""
  return (
    is_narrow_product(equation)
    and is_plain_convolution(equation)
    and equation.params['feature_group_count'] == 1
    and kernels.suits(
      *(aval.shape for aval in equation.in_avals),
      output_shape(equation),
      equation.params['window_strides'],
    )
  )


class Units:
  """The equations of a program, divided into units.

  A unit is a kernel with its equations, or a single equation. It is identified
  by the index of its first equation in the program.

  Attributes:
    members: indices of the equations of each unit, in order.
    shapes: shape of the outputs of each unit that is a kernel.
    maker: the unit that computes the value in a slot.
  """

  def __init__(self, program: Program):
    self.program = program
    self.members: dict[int, list[int]] = {}
    self.shapes: dict[int, tuple[int, ...]] = {}
    self.maker: dict[int, int] = {}
    for place, equation in enumerate(program.equations):
      home = self._home(equation)
      if home is None:
        home, self.members[place] = place, []
        if _has_kernel(equation):
          self.shapes[place] = output_shape(equation)
      self.members[home].append(place)
      self.maker |= dict.fromkeys(equation.outputs, home)

  def reads(self, unit: int) -> set[int]:
    """Slots that the equations of a unit read, its own outputs among them."""
    equations = [self.program.equations[p] for p in self.members[unit]]
    return {slot for equation in equations for slot in equation.inputs}

  def needs(self, unit: int) -> set[int]:
    """Other units that compute what a unit reads."""
    return {self.maker[s] for s in self.reads(unit) if s in self.maker} - {unit}

  def _depends(self, unit: int, other: int) -> bool:
    """Whether a unit needs another one, directly or through others."""
    seen, ahead = {unit}, {unit} - {other}
    while ahead and other not in seen:
      ahead = set().union(*map(self.needs, ahead)) - seen
      seen |= ahead
    return unit != other and other in seen

  def _home(self, equation: Equation) -> int | None:
    """The kernel that an equation is added to; None if it cannot be.

    Of the kernels that it reads, it is the last: none of the others depends on
    it. If several are last, they become one.
    """
    avals = [self.program.avals[slot] for slot in equation.inputs]
    if not _is_elementwise(equation) or not all(
      _fits(aval.shape, output_shape(equation)) for aval in avals
    ):
      return None
    makers = {self.maker[s] for s in equation.inputs if s in self.maker}
    homes = [u for u in makers if self.shapes.get(u) == output_shape(equation)]
    last = [u for u in homes if not any(self._depends(v, u) for v in homes)]
    if not last:
      return None
    # Its other operands must not depend on these kernels, or these would depend
    # on themselves.
    if any(self._depends(u, v) for u in makers for v in last):
      return None
    return self._joined(sorted(last))

  def _joined(self, units: list[int]) -> int:
    """The first of some kernels, joined with the others as far as they fit.

    None of them depends on another.
    """
    home, *others = units
    for other in others:
      places = sorted(self.members[home] + self.members[other])
      equations = [self.program.equations[p] for p in places]
      names = [equation.name for equation in equations]
      if names.count('conv_general_dilated') > _MOST_CONVOLUTIONS:
        continue
      self.members[home] = places
      del self.members[other], self.shapes[other]
      for equation in equations:
        self.maker |= dict.fromkeys(equation.outputs, home)
    return home
