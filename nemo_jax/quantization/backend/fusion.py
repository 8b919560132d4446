"""Plans which equations of a program are fused into one kernel.

A kernel computes a convolution and the elementwise operations that follow it:
scales, norms, shortcuts, activation functions and the rounding to the codes of
the next layer.
"""

import graphlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from nemo_jax.core.types import Array, ArrayLike, PyTree
from nemo_jax.quantization.backend import kernels
from nemo_jax.quantization.backend import lowering as lowering_lib
from nemo_jax.quantization.backend.units import (
  Units,
  is_narrow_product,
  output_shape,
)
from nemo_jax.quantization.trace import program as program_lib
from nemo_jax.quantization.trace.equations import Equation, bind

# Of `units.ELEMENTWISE`: what kernels lack or define differently.
_IN_KERNEL = {
  'clamp': lambda low, x, high: kernels.minimum(kernels.maximum(low, x), high),
  'max': kernels.maximum,
  'min': kernels.minimum,
  'round': kernels.nearest,
}


class Group(NamedTuple):
  """The equations of one kernel, whose outputs all have one shape."""

  convolutions: tuple[Equation, ...]
  tail: tuple[Equation, ...]  # elementwise, in order
  operands: tuple[int, ...]  # slots that the tail reads and does not compute
  outputs: tuple[int, ...]  # slots that are read elsewhere


def plan(program: program_lib.Program) -> list[Equation | Group]:
  """A program as groups for kernels and single equations, in executable order.

  Args:
    program: what to divide; convolutions with operands in bfloat16 and sums in
      float32 get kernels.
  """
  units = Units(program)
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
  group: Group,
  program: program_lib.Program,
  values: dict[int, Any],
  interpret: bool,
) -> list[Array]:
  """The outputs of a group, computed by a kernel from the values in slots."""
  convolutions = [
    kernels.Convolution(
      *(values[slot] for slot in equation.inputs),
      equation.params['window_strides'],
      equation.params['padding'],
    )
    for equation in group.convolutions
  ]
  shape = output_shape(group.convolutions[0])
  # Constant numbers are compiled into the kernel.
  numbers: dict[int, Any] = {
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
        (out,) = bind(equation, inputs)
      found[equation.outputs[0]] = out
    return [found[slot] for slot in group.outputs]

  operands = [x if x.shape == shape else x.reshape(-1) for x in arrays.values()]
  dtypes = [program.avals[slot].dtype for slot in group.outputs]
  return kernels.convolve(convolutions, tail, operands, dtypes, interpret)


def _execute(equation: Equation, operands: list[Any]) -> Sequence[Any]:
  """The outputs of an equation that is in no group."""
  if is_narrow_product(equation):
    return [lowering_lib.of_codes_on_gpu(equation, operands)]
  return bind(equation, operands)


def run(
  program: program_lib.Program,
  arguments: Sequence[ArrayLike],
  interpret: bool = False,
) -> list[Any]:
  """The outputs of a program, with kernels for the groups of `plan`.

  Args:
    program: as for `plan`.
    arguments: one array for each of `program.inputs`.
    interpret: whether to run kernels on a CPU, slowly.
  """
  values = dict(program.constants)
  values.update(zip(program.inputs, arguments, strict=True))
  for item in plan(program):
    if isinstance(item, Group):
      results = []
      if item.outputs:  # else no other equation reads them
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
  """A function with its convolutions in bfloat16 computed by kernels.

  Args:
    apply: any function of arrays. Operands that it multiplies in bfloat16 with
      sums in float32 have to be integers: of other numbers XLA might keep more
      digits than bfloat16 has.
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
  """A function of arrays that uses kernels on NVIDIA GPUs that have them.

  Args:
    of_codes: the function with convolutions of codes in bfloat16.
    plain: the same function for other platforms, and for derivatives.
  """

  def run(*arguments):
    # Captured arrays become arguments, as they have derivatives too.
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
