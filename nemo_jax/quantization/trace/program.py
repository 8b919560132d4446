"""Programs: traced JAX functions as flat lists of equations."""

from collections.abc import Callable, Container, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend as jex
import numpy as np
from jax.interpreters import partial_eval

from nemo_jax.core.types import PyTree
from nemo_jax.quantization.trace.equations import (
  Equation,
  bind,
  matrix_products,
  sub_jaxprs,
)

# Calls that do no more than their body: always replaced by it.
_PLAIN_CALLS = ('jit', 'pjit', 'closed_call', 'core_call', 'remat2', 'remat')
# Calls with a derivative of their own: kept whole, and so is the derivative,
# unless a matrix product inside has to be reached.
_CUSTOM_CALLS = ('custom_jvp_call', 'custom_vjp_call')


class Program(NamedTuple):
  """Equations in order of execution; every value has a slot of its own."""

  equations: tuple[Equation, ...]
  constants: dict[int, Any]  # literals and captured arrays, by slot
  variables: tuple[int, ...]  # slots of the first inputs
  examples: tuple[
    int, ...
  ]  # slots of the others, whose first axis is the batch
  outputs: tuple[int, ...]  # slots
  avals: dict[int, Any]  # shape and dtype of the value in each slot

  @property
  def inputs(self) -> tuple[int, ...]:
    """Slots of all inputs."""
    return self.variables + self.examples


def _body(
  eqn: jex.core.JaxprEqn, derivatives: bool
) -> tuple[jex.core.Jaxpr, Sequence[Any]] | None:
  """The jaxpr and constants that replace a call; None if it is kept."""
  name = eqn.primitive.name
  if name not in _PLAIN_CALLS + _CUSTOM_CALLS:
    return None
  if name in _CUSTOM_CALLS and derivatives and not matrix_products(eqn):
    return None
  key = next(k for k in ('jaxpr', 'call_jaxpr', 'fun_jaxpr') if k in eqn.params)
  body = eqn.params[key]
  if isinstance(body, jex.core.ClosedJaxpr):
    return body.jaxpr, body.consts
  return body, ()


def identity(value: Any) -> tuple[int, ...]:
  """A key that is equal for arrays in the same memory."""
  if not isinstance(value, np.ndarray):
    return (id(value),)
  return (value.__array_interface__['data'][0], *value.strides)


def flatten(
  closed: jex.core.ClosedJaxpr, derivatives: bool = True, examples: int = 1
) -> Program:
  """The program of a jaxpr, with nested calls replaced by their bodies.

  Args:
    closed: the jaxpr.
    derivatives: whether calls with a derivative of their own are kept, see
      `_CUSTOM_CALLS`.
    examples: how many of the last inputs have a batch axis.
  """
  equations: list[Equation] = []
  constants: dict[int, Any] = {}
  avals: dict[int, Any] = {}
  held: dict[Any, int] = {}  # slots of constants

  def new_slot(aval):
    avals[len(avals)] = aval
    return len(avals) - 1

  def constant(aval, value):
    # A captured array has one slot, even if the function is called repeatedly.
    key = (str(aval), identity(value))
    if is_number(value) or key not in held:
      held[key] = new_slot(aval)
      constants[held[key]] = value
    return held[key]

  def walk(jaxpr, consts, inputs):
    slots = dict(zip(jaxpr.invars, inputs, strict=True))
    for var, value in zip(jaxpr.constvars, consts, strict=True):
      slots[var] = constant(var.aval, value)

    def read(atom):
      if isinstance(atom, jex.core.Literal):
        return constant(atom.aval, atom.val)
      return slots[atom]

    for eqn in jaxpr.eqns:
      ins = tuple(read(v) for v in eqn.invars)
      if body := _body(eqn, derivatives):
        outs = walk(*body, ins)
      else:
        outs = tuple(new_slot(v.aval) for v in eqn.outvars)
        equations.append(Equation(eqn, ins, outs))
      slots.update(zip(eqn.outvars, outs, strict=True))
    return tuple(read(v) for v in jaxpr.outvars)

  inputs = tuple(new_slot(v.aval) for v in closed.jaxpr.invars)
  outputs = walk(closed.jaxpr, closed.consts, inputs)
  first = len(inputs) - examples
  return Program(
    equations=tuple(equations),
    constants=constants,
    variables=inputs[:first],
    examples=inputs[first:],
    outputs=outputs,
    avals=avals,
  )


def trace(
  function: Callable[..., Any], variables: PyTree, inputs: PyTree
) -> tuple[Program, PyTree]:
  """The program of a function without dead code, and shapes of its outputs.

  Args:
    function: (variables, inputs) -> outputs.
    variables: a pytree of arrays, or of their `jax.ShapeDtypeStruct`.
    inputs: likewise; the first axis of its arrays is the batch.

  Returns:
    The program; and the outputs as a pytree of `jax.ShapeDtypeStruct`.
  """
  closed, shapes = jax.make_jaxpr(function, return_shape=True)(
    variables, inputs
  )
  # This removes dead code in loops too, which `flatten` leaves whole.
  used = [True] * len(closed.jaxpr.outvars)
  jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, used, instantiate=True)
  program = flatten(
    jex.core.ClosedJaxpr(jaxpr, closed.consts),
    examples=len(jax.tree.leaves(inputs)),
  )
  # A weight that is computed again at every use becomes one tensor.
  program = without_repeats(without_dead_code(program), static=True)
  return program, shapes


def is_number(value: Any) -> bool:
  """Whether a constant is a single number that is known while tracing."""
  return np.ndim(value) == 0 and not isinstance(value, jax.Array)


def static_slots(program: Program) -> set[int]:
  """Slots of values that do not depend on the examples."""
  static = {*program.constants, *program.variables}
  for equation in program.equations:
    if static.issuperset(equation.inputs):
      static |= set(equation.outputs)
  return static


def without_repeats(program: Program, static: bool = False) -> Program:
  """The program with repeated computations done once.

  Args:
    program: the program.
    static: whether only values that do not depend on the examples are merged.
  """
  same: dict[int, int] = {}  # repeated slots, and the slots that replace them
  seen: dict[Any, tuple[int, ...]] = {}
  equations = []
  among = static_slots(program) if static else None

  def is_new(key, slots):
    first = seen.setdefault(key, slots)
    same.update(zip(slots, first, strict=True))
    return first is slots

  for slot, value in program.constants.items():
    if is_number(value):
      # By bytes, as -0.0 equals 0.0.
      is_new((str(program.avals[slot]), np.asarray(value).tobytes()), (slot,))
  for equation in program.equations:
    inputs = tuple(same.get(slot, slot) for slot in equation.inputs)
    # The text of a jaxpr does not show its constants.
    whole = str(equation.params)
    apart = among is not None and not among.issuperset(equation.outputs)
    if apart or equation.eqn.effects or sub_jaxprs(equation.eqn):
      whole = equation.outputs
    if is_new((equation.name, inputs, whole), equation.outputs):
      equations.append(equation._replace(inputs=inputs))
  outputs = tuple(same.get(slot, slot) for slot in program.outputs)
  return program._replace(equations=tuple(equations), outputs=outputs)


def read_slots(
  program: Program, outputs: Sequence[int], cut: Container[tuple[int, int]] = ()
) -> set[int]:
  """Slots that are read to compute the values in some slots.

  Args:
    program: the program.
    outputs: slots whose values are wanted; they are among those returned.
    cut: (index of an equation, operand) pairs that are not read, because
      another value replaces them.
  """
  wanted = set(outputs)
  for place, equation in reversed(list(enumerate(program.equations))):
    if not wanted.isdisjoint(equation.outputs):
      operands = enumerate(equation.inputs)
      wanted |= {slot for i, slot in operands if (place, i) not in cut}
  return wanted


def needed_for(program: Program, slots: Sequence[int]) -> Program:
  """The part of a program that computes the values in some slots."""
  wanted = read_slots(program, slots)
  equations = [e for e in program.equations if not wanted.isdisjoint(e.outputs)]
  return program._replace(equations=tuple(equations), outputs=tuple(slots))


def without_dead_code(program: Program) -> Program:
  """The program without equations that no output and no effect depends on."""
  effects = [e for e in program.equations if e.eqn.effects]
  slots = [slot for e in effects for slot in (*e.inputs, *e.outputs)]
  wanted = read_slots(program, [*program.outputs, *slots])
  kept = [
    e
    for e in program.equations
    if e.eqn.effects or not wanted.isdisjoint(e.outputs)
  ]
  return program._replace(equations=tuple(kept))


def run_static(program: Program, variables: Sequence[Any]) -> list[Any]:
  """The outputs of a program that does not depend on the examples.

  Args:
    program: from `needed_for`.
    variables: one array for each of `program.variables`.
  """
  return run(program, [*variables, *[None] * len(program.examples)])


def run(
  program: Program,
  arguments: Sequence[Any],
  execute: Callable[[Equation, list[Any]], Sequence[Any]] = bind,
) -> list[Any]:
  """The outputs of a program, as arrays; some may be captured or numbers.

  Args:
    program: what to run.
    arguments: one array for each of `program.inputs`, or None for one that
      nothing reads.
    execute: (equation, operands) -> outputs; `bind` runs it as traced.
  """
  values = dict(program.constants)
  values.update(zip(program.inputs, arguments, strict=True))
  for equation in program.equations:
    operands = [values[slot] for slot in equation.inputs]
    with equation.eqn.ctx.manager:
      results = execute(equation, operands)
    values.update(zip(equation.outputs, results, strict=True))
  return [values[slot] for slot in program.outputs]
