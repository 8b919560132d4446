"""Static knowledge of the value in every slot of a program."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from nemo_jax.core.types import InputError
from nemo_jax.quantization.trace import operations as operations_lib
from nemo_jax.quantization.trace import program as program_lib
from nemo_jax.quantization.trace.equations import (
  MATRIX_PRODUCTS,
  Equation,
  matrix_products,
)

# Primitives whose outputs hold the values of their input, in another shape or
# order.
_VIEWS = (
  'broadcast_in_dim',
  'convert_element_type',
  'copy',
  'copy_p',
  'expand_dims',
  'name',
  'reshape',
  'rev',
  'sharding_constraint',
  'squeeze',
  'transpose',
)
# Primitives that may select values or add zeros, which an activation with one
# scale and an exact zero allows.
_ACTIVATION_VIEWS = ('pad', 'reduce_window_max', 'slice')


class Variable(NamedTuple):
  """A leaf of the variables, an input of the program."""

  name: str
  size: int  # number of elements


class Value(NamedTuple):
  """What is known of the value in a slot before the program is run."""

  dynamic: bool  # whether it depends on the inputs
  root: int  # slot whose values it holds, perhaps in another shape
  view: tuple[tuple[str, str], ...]  # primitives from the root to this slot
  # Equations of the nearest operations that it is computed from.
  sources: frozenset[int]
  leaves: frozenset[int]  # indices of variables that it is computed from
  captured: frozenset[int]  # slots of captured arrays, likewise


def _zeros(program: program_lib.Program) -> set[int]:
  """Slots that hold the constant zero, in its type or converted from it."""
  zeros: set[int] = set()
  for slot, value in program.constants.items():
    aval = program.avals[slot]
    is_number = aval.shape == () and jnp.issubdtype(aval.dtype, jnp.number)
    # NumPy compares captured values immediately, where JAX would trace the
    # comparison. Values that are traced are not known.
    if is_number and not isinstance(value, Tracer):
      zeros |= {slot} if np.asarray(value) == 0 else set()
  for equation in program.equations:
    if equation.name == 'convert_element_type' and equation.inputs[0] in zeros:
      zeros |= set(equation.outputs)
  return zeros


def _is_view(
  equation: Equation, value: Value, avals: Mapping[int, Any], zeros: set[int]
) -> bool:
  """Whether outputs hold values of the first input, and nothing else but zeros.

  Args:
    equation: any equation with inputs.
    value: its first input.
    avals: shape and dtype in each slot.
    zeros: slots that hold the constant zero.
  """
  slots = (equation.inputs[0], *equation.outputs)
  dtypes: list[Any] = [getattr(avals[s], 'dtype', None) for s in slots]
  if not all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes):
    return False
  if equation.name == 'pad':
    return value.dynamic and equation.inputs[1] in zeros
  views = _VIEWS + _ACTIVATION_VIEWS if value.dynamic else _VIEWS
  return equation.name in views


def _is_add(
  equation: Equation, values: list[Value], avals: Mapping[int, Any]
) -> bool:
  """Whether an equation adds two branches of the network.

  An addition x + f(x) within an activation function is not one.
  """
  if equation.name not in ('add', 'add_any'):
    return False
  shapes = {avals[slot].shape for slot in equation.inputs}
  branches = {value.sources for value in values}
  return (
    all(v.dynamic for v in values) and len(shapes) == 1 and len(branches) == 2
  )


def _size(program: program_lib.Program, slot: int) -> int:
  """Number of elements in a slot."""
  return math.prod(program.avals[slot].shape)


def _is_stored(program: program_lib.Program, value: Value, slot: int) -> bool:
  """Whether an operand is stored, or depends on the inputs.

  It is not if it is computed from fewer numbers than it has, as the matrices
  that resample images are from sizes and a scale.
  """
  if value.dynamic or value.leaves or value.root in value.captured:
    return True
  known = sum(_size(program, captured) for captured in value.captured)
  return bool(value.captured) and known >= _size(program, slot)


def _is_multiplication(
  program: program_lib.Program, equation: Equation, values: list[Value]
) -> bool:
  """Whether a product sums over a single index and has no variable."""
  if equation.name != 'dot_general':
    return False
  (contracted, _), _ = equation.params['dimension_numbers']
  shape = program.avals[equation.inputs[0]].shape
  return math.prod(shape[a] for a in contracted) == 1 and not any(
    value.leaves and not value.dynamic for value in values
  )


def _check_product(
  equation: Equation, values: list[Value], variables: Sequence[Variable]
) -> None:
  """Raises an error for a product of the inputs that cannot be quantized."""
  products = matrix_products(equation.eqn)
  if products and equation.name not in MATRIX_PRODUCTS:
    raise NotImplementedError(
      f"cannot quantize through '{equation.name}', which holds a matrix "
      f'product of the inputs ({products[0]}). Matrix products are reached '
      'at the top level and inside jit, remat and custom derivatives; '
      'unroll the loop or call the layer directly.'
    )
  if equation.name not in MATRIX_PRODUCTS:
    return
  for value, aval in zip(values, equation.in_avals, strict=True):
    dtype = aval.dtype
    weight = '' if value.dynamic else f' with {weight_name(value, variables)}'
    if jnp.issubdtype(dtype, jnp.complexfloating):
      raise InputError(
        f'a product of complex numbers{weight} cannot be quantized; write it '
        'as products of real and imaginary parts'
      )
    is_float = jnp.issubdtype(dtype, jnp.floating)
    if value.leaves and not value.dynamic and not is_float:
      raise InputError(
        f'a product{weight} is one of {dtype}; give the network in floating '
        'point, before it was quantized'
      )


def _is_product(
  program: program_lib.Program, equation: Equation, values: list[Value]
) -> bool:
  """Whether it is a matrix product of floating-point numbers."""
  return (
    equation.name in MATRIX_PRODUCTS
    and bool(matrix_products(equation.eqn))
    and not _is_multiplication(program, equation, values)
  )


def _is_fixed(
  program: program_lib.Program, equation: Equation, values: list[Value]
) -> bool:
  """Whether a matrix product has an operand that is not stored."""
  operands = zip(values, equation.inputs, strict=True)
  return _is_product(program, equation, values) and not all(
    _is_stored(program, value, slot) for value, slot in operands
  )


def _consumes(
  program: program_lib.Program,
  equation: Equation,
  values: list[Value],
  extra_ops: Sequence[str],
) -> bool:
  """Whether the operands of an equation are quantized."""
  if _is_product(program, equation, values):
    return not _is_fixed(program, equation, values)
  aval = program.avals[equation.outputs[0]] if equation.outputs else None
  # Sums of integers are indices and counts.
  if aval is None or not jnp.issubdtype(aval.dtype, jnp.floating):
    return False
  if 'add' in extra_ops and _is_add(equation, values, program.avals):
    return True
  shape = program.avals[equation.inputs[0]].shape
  return 'pool' in extra_ops and operations_lib.is_pool(equation, shape)


def _start(program: program_lib.Program, num_leaves: int) -> dict[int, Value]:
  """The `Value`s of constants and inputs, by slot."""
  none: frozenset[int] = frozenset()
  values = {}
  for slot, value in program.constants.items():
    captured = none if program_lib.is_number(value) else frozenset([slot])
    values[slot] = Value(False, slot, (), none, none, captured)
  for i, slot in enumerate(program.inputs):
    leaves = frozenset([i]) if i < num_leaves else none
    values[slot] = Value(i >= num_leaves, slot, (), none, leaves, none)
  return values


def propagate(
  program: program_lib.Program,
  variables: Sequence[Variable],
  extra_ops: Sequence[str],
) -> tuple[dict[int, Value], list[int], list[str]]:
  """What is known of every value of a program before it is run.

  Args:
    program: flattened `apply(variables, inputs)`.
    variables: names and sizes of the leaves of the variables.
    extra_ops: see `analysis.analyze`.

  Returns:
    The `Value` of every slot; indices of the equations whose operands are
    quantized; and, as text, the matrix products that are no layers because an
    operand is computed and not stored.

  Raises:
    NotImplementedError: see `analysis.analyze`.
    InputError: likewise.
  """
  values, zeros = _start(program, len(variables)), _zeros(program)
  consumers, fixed = [], []
  for index, equation in enumerate(program.equations):
    ins = [values[slot] for slot in equation.inputs]
    dynamic = any(v.dynamic for v in ins)
    join = lambda field, ins=ins: frozenset().union(
      *(getattr(v, field) for v in ins)
    )
    sources = join('sources')
    if dynamic:
      _check_product(equation, ins, variables)
      if _consumes(program, equation, ins, extra_ops):
        consumers.append(index)
        sources = frozenset([index])
      elif _is_fixed(program, equation, ins):
        shapes = [list(program.avals[s].shape) for s in equation.inputs]
        fixed.append(f'{equation.name} {shapes[0]} {shapes[1]}')
    for slot in equation.outputs:
      values[slot] = Value(
        dynamic, slot, (), sources, join('leaves'), join('captured')
      )
      if ins and _is_view(equation, ins[0], program.avals, zeros):
        step = (equation.name, str(equation.params))
        view = (*ins[0].view, step)
        values[slot] = ins[0]._replace(view=view)
  return values, consumers, fixed


def weight_name(value: Value, variables: Sequence[Variable]) -> str:
  """Name of the variable that a weight is, or of the largest it comes from.

  It is `constant` for a weight that is computed from no variable.
  """
  if not value.leaves:
    return 'constant'
  largest = max(sorted(value.leaves), key=lambda i: variables[i].size)
  return variables[largest].name
