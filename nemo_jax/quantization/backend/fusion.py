"""Which equations of a program one kernel computes together.

A convolution, and what follows it number by number: scales, norms, shortcuts,
activation functions and the rounding to the codes of the next layer.
"""

import graphlib
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nemo_jax.core.types import Array, PyTree
from nemo_jax.quantization.backend import kernels
from nemo_jax.quantization.backend import lowering as lowering_lib
from nemo_jax.quantization.trace import program as program_lib

# What is computed number by number, and alike by whoever computes it: quotients
# and exponentials of a kernel would be others than XLA's.
_ELEMENTWISE = (
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
# Those that the language of kernels lacks or has otherwise.
_IN_KERNEL = {
  'clamp': lambda low, x, high: kernels.minimum(kernels.maximum(low, x), high),
  'max': kernels.maximum,
  'min': kernels.minimum,
  'round': kernels.nearest,
}
# The sums of more would not fit in the registers.
_MOST_CONVOLUTIONS = 2


class Group(NamedTuple):
  """What one kernel computes; its outputs have one shape."""

  convolutions: tuple[program_lib.Equation, ...]
  tail: tuple[program_lib.Equation, ...]  # in order
  operands: tuple[int, ...]  # slots that the tail reads, not its own
  outputs: tuple[int, ...]  # slots


def _shape(equation: program_lib.Equation) -> tuple[int, ...]:
  """Of the first output."""
  return equation.eqn.outvars[0].aval.shape


def _fits(given: tuple[int, ...], shape: tuple[int, ...]) -> bool:
  """Whether it is one number, or one a channel or an output."""
  return (
    given == shape
    or math.prod(given) == 1
    or (given[-1:] == shape[-1:] == (math.prod(given),))
  )


def _is_elementwise(equation: program_lib.Equation) -> bool:
  """Whether a kernel may compute it, if its operands fit."""
  to_even = jax.lax.RoundingMethod.TO_NEAREST_EVEN
  return (
    equation.name in _ELEMENTWISE
    and equation.params.get('rounding_method', to_even) == to_even
    and jnp.issubdtype(equation.eqn.outvars[0].aval.dtype, jnp.floating)
  )


def _is_narrow_product(equation: program_lib.Equation) -> bool:
  """Whether it is a product in bfloat16 that is summed in float32."""
  dtypes = [v.aval.dtype for v in (*equation.eqn.invars, *equation.eqn.outvars)]
  return equation.name in program_lib.MATRIX_PRODUCTS and (
    dtypes == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
  )


def _has_kernel(equation: program_lib.Equation) -> bool:
  return (
    _is_narrow_product(equation)
    and lowering_lib.is_plain_convolution(equation)
    and equation.params['feature_group_count'] == 1
    and kernels.suits(
      *(v.aval.shape for v in equation.eqn.invars),
      _shape(equation),
      equation.params['window_strides'],
    )
  )


class _Units:
  """Equations, by their places in a program, under what computes them.

  A unit is a kernel or an equation by itself, known by the first of its places.
  """

  def __init__(self, program: program_lib.Program):
    self.program = program
    self.members = {}  # [places] of a unit, in order
    self.shapes = {}  # of the outputs of units that are kernels
    self.maker = {}  # unit that makes the value in a slot
    for place, equation in enumerate(program.equations):
      home = self._home(equation)
      if home is None:
        home, self.members[place] = place, []
        if _has_kernel(equation):
          self.shapes[place] = _shape(equation)
      self.members[home].append(place)
      self.maker |= dict.fromkeys(equation.outputs, home)

  def reads(self, unit: int) -> set[int]:
    """Slots that hold what a unit reads, its own among them."""
    equations = [self.program.equations[p] for p in self.members[unit]]
    return {slot for equation in equations for slot in equation.inputs}

  def needs(self, unit: int) -> set[int]:
    """Units that make what a unit reads."""
    return {self.maker[s] for s in self.reads(unit) if s in self.maker} - {unit}

  def _waits(self, unit: int, other: int) -> bool:
    """Whether a unit needs another one, by any number of steps."""
    seen, ahead = {unit}, {unit} - {other}
    while ahead and other not in seen:
      ahead = set().union(*map(self.needs, ahead)) - seen
      seen |= ahead
    return unit != other and other in seen

  def _home(self, equation) -> int | None:
    """The kernel that an equation may join: the last of those it reads."""
    avals = [self.program.avals[slot] for slot in equation.inputs]
    if not _is_elementwise(equation) or not all(
      _fits(aval.shape, _shape(equation)) for aval in avals
    ):
      return None
    makers = {self.maker[s] for s in equation.inputs if s in self.maker}
    homes = [u for u in makers if self.shapes.get(u) == _shape(equation)]
    last = [u for u in homes if not any(self._waits(v, u) for v in homes)]
    if not last:
      return None
    # What it reads beside must not come of these kernels in turn.
    if any(self._waits(u, v) for u in makers for v in last):
      return None
    return self._joined(sorted(last))

  def _joined(self, units: list[int]) -> int:
    """One kernel for those of which none waits for another."""
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


def plan(program: program_lib.Program) -> list[program_lib.Equation | Group]:
  """A program as kernels and single equations, in order of execution.

  Args:
    program: the operands of convolutions for kernels are in bfloat16.
  """
  units = _Units(program)
  needed = {unit: units.needs(unit) for unit in units.members}
  reads = {unit: units.reads(unit) for unit in units.members}

  def item(unit):
    equations = [program.equations[p] for p in units.members[unit]]
    if unit not in units.shapes:
      return equations[0]
    of_kernel = lambda e: e.name == 'conv_general_dilated'
    tail = [e for e in equations if not of_kernel(e)]
    made = [slot for e in equations for slot in e.outputs]
    beside = {slot for e in tail for slot in e.inputs} - set(made)
    wanted = set(program.outputs).union(
      *(slots for other, slots in reads.items() if other != unit)
    )
    return Group(
      tuple(filter(of_kernel, equations)),
      tuple(tail),
      tuple(sorted(beside)),
      tuple(slot for slot in made if slot in wanted),
    )

  return [item(u) for u in graphlib.TopologicalSorter(needed).static_order()]


def _compute(
  group: Group, program: program_lib.Program, values, interpret: bool
) -> list[Array]:
  """The outputs of a group, from the values in slots."""
  convolutions = [
    kernels.Convolution(
      *(values[slot] for slot in equation.inputs),
      equation.params['window_strides'],
      equation.params['padding'],
    )
    for equation in group.convolutions
  ]
  shape = _shape(group.convolutions[0])
  # Numbers of the program become a part of the kernel.
  numbers = {
    slot: np.asarray(values[slot])[()]
    for slot in group.operands
    if program_lib.is_number(values[slot])
  }
  arrays = {s: values[s] for s in group.operands if s not in numbers}

  def tail(sums, tiles):
    found = dict(numbers)
    found |= zip(arrays, tiles, strict=True)
    for equation, tile in zip(group.convolutions, sums, strict=True):
      found[equation.outputs[0]] = tile
    for equation in group.tail:
      inputs = [found[slot] for slot in equation.inputs]
      if equation.name in _IN_KERNEL:
        out = _IN_KERNEL[equation.name](*inputs)
      else:
        (out,) = program_lib.bind(equation, inputs)
      found[equation.outputs[0]] = out
    return [found[slot] for slot in group.outputs]

  operands = [x if x.shape == shape else x.reshape(-1) for x in arrays.values()]
  dtypes = [program.avals[slot].dtype for slot in group.outputs]
  return kernels.convolve(convolutions, tail, operands, dtypes, interpret)


def _execute(equation, operands: list[Array]) -> list[Array]:
  """The outputs of an equation that is in no group."""
  if _is_narrow_product(equation):
    return [lowering_lib.of_codes_on_gpu(equation, operands)]
  return program_lib.bind(equation, operands)


def run(
  program: program_lib.Program,
  arguments: Sequence[Array],
  interpret: bool = False,
) -> list[Array]:
  """The outputs of a program, by kernels where there are any.

  Args:
    program: as for `plan`.
    arguments: one array for each of `program.inputs`.
    interpret: runs kernels on a CPU, slowly.
  """
  values = dict(program.constants)
  values.update(zip(program.inputs, arguments, strict=True))
  for item in plan(program):
    if isinstance(item, Group):
      results = []
      if item.outputs:  # else nobody reads them
        results = _compute(item, program, values, interpret)
    else:
      operands = [values[slot] for slot in item.inputs]
      with item.eqn.ctx.manager:
        results = _execute(item, operands)
    values.update(zip(item.outputs, results, strict=True))
  return [values[slot] for slot in program.outputs]


def by_kernels(
  apply: Callable[..., PyTree], interpret: bool = False
) -> Callable[..., PyTree]:
  """A function with its convolutions in bfloat16 run by kernels.

  Args:
    apply: any function of arrays. What it multiplies in bfloat16 for sums in
      float32 are whole numbers, or XLA might see more in them than bfloat16
      holds.
    interpret: as for `run`.
  """

  def fused(*arguments):
    closed, shapes = jax.make_jaxpr(apply, return_shape=True)(*arguments)
    program = program_lib.flatten(closed, derivatives=False)
    program = program_lib.without_repeats(program)
    outputs = run(program, jax.tree.leaves(arguments), interpret)
    return jax.tree.unflatten(jax.tree.structure(shapes), outputs)

  return fused


def on_gpu(
  of_codes: Callable[..., PyTree], plain: Callable[..., PyTree]
) -> Callable[..., PyTree]:
  """A function of arrays that is run by kernels where it can be.

  Args:
    of_codes: it, with convolutions of codes in bfloat16.
    plain: it, for other platforms and derivatives.
  """

  def run(*arguments):
    # What a function captured has derivatives too.
    codes, seen = jax.closure_convert(of_codes, *arguments)
    floats, captured = jax.closure_convert(plain, *arguments)

    @jax.custom_jvp
    def either(arguments, seen, captured):
      return jax.lax.platform_dependent(
        arguments,
        seen,
        captured,
        cuda=lambda x, seen, _: by_kernels(codes)(*x, *seen),
        default=lambda x, _, captured: floats(*x, *captured),
      )

    @either.defjvp
    def differentiate(primals, tangents):
      forward = lambda x, _, captured: floats(*x, *captured)
      return jax.jvp(forward, primals, tangents)

    return either(arguments, seen, captured)

  return run if kernels.available() else plain
