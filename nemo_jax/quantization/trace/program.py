"""A traced JAX function as a flat list of equations that can be intercepted."""

from collections.abc import Callable, Container, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend as jex
import numpy as np
from jax.interpreters import partial_eval

from nemo_jax.core.types import PyTree

MATRIX_PRODUCTS = ('conv_general_dilated', 'dot_general')

# Calls that mean no more than their body: always taken apart.
_PLAIN_CALLS = ('jit', 'pjit', 'closed_call', 'core_call', 'remat2', 'remat')
# Calls with a derivative of their own: kept whole, and so with it, unless a
# matrix product inside has to be reached.
_CUSTOM_CALLS = ('custom_jvp_call', 'custom_vjp_call')


class Equation(NamedTuple):
  """One primitive applied to numbered slots."""

  eqn: jex.core.JaxprEqn
  inputs: tuple[int, ...]
  outputs: tuple[int, ...]

  @property
  def name(self) -> str:
    """The name of the primitive."""
    return self.eqn.primitive.name

  @property
  def params(self) -> dict[str, Any]:
    """The parameters of the primitive."""
    return self.eqn.params


class Program(NamedTuple):
  """Equations in order of execution; every value has one slot."""

  equations: tuple[Equation, ...]
  constants: dict[int, Any]  # slots that hold literals and captured arrays
  variables: tuple[int, ...]  # slots of the first inputs
  examples: tuple[int, ...]  # of the others, whose first axis is the batch
  outputs: tuple[int, ...]
  avals: dict[int, Any]  # the shape and dtype in each slot

  @property
  def inputs(self) -> tuple[int, ...]:
    """Slots of all inputs."""
    return self.variables + self.examples


def sub_jaxprs(eqn: jex.core.JaxprEqn) -> list[jex.core.Jaxpr]:
  """The jaxprs held in the parameters of an equation."""
  found = []
  for param in eqn.params.values():
    for value in param if isinstance(param, tuple | list) else (param,):
      if isinstance(value, jex.core.ClosedJaxpr):
        found.append(value.jaxpr)
      elif isinstance(value, jex.core.Jaxpr):
        found.append(value)
  return found


def _is_product(eqn: jex.core.JaxprEqn) -> bool:
  """Whether it is a sum of products, and not products alone."""
  if not {'dot', 'conv'} & set(eqn.primitive.name.split('_')):
    return False
  if eqn.primitive.name != 'dot_general':
    return True
  (contracted, _), _ = eqn.params['dimension_numbers']
  return bool(contracted)


def matrix_products(eqn: jex.core.JaxprEqn) -> list[str]:
  """Names of the matrix products in an equation, at any depth.

  Products that sum over no axis, such as outer products, are multiplications
  and no matrix products. Those of whole numbers are left out. Any other
  primitive with `dot` or `conv` as a word of its name counts, so that a product
  that is new to this package is noticed rather than passed over.
  """
  if subs := sub_jaxprs(eqn):
    return [n for s in subs for e in s.eqns for n in matrix_products(e)]
  is_inexact = jax.numpy.issubdtype(
    eqn.outvars[0].aval.dtype, jax.numpy.inexact
  )
  return [eqn.primitive.name] if is_inexact and _is_product(eqn) else []


def _body(
  eqn: jex.core.JaxprEqn, derivatives: bool
) -> tuple[jex.core.Jaxpr, Sequence] | None:
  """The jaxpr and constants to put in place of a call, None to keep it."""
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


def identity(value) -> tuple[int, ...]:
  """What is equal for an array and whatever else holds the same memory."""
  if not isinstance(value, np.ndarray):
    return (id(value),)
  return (value.__array_interface__['data'][0], *value.strides)


def flatten(
  closed: jex.core.ClosedJaxpr, derivatives: bool = True, examples: int = 1
) -> Program:
  """The program of a jaxpr with its nested calls taken apart.

  Args:
    closed: the jaxpr.
    derivatives: whether those that functions define for themselves are kept.
    examples: how many of the last inputs hold examples.
  """
  equations, constants, avals, held = [], {}, {}, {}

  def new_slot(aval):
    avals[len(avals)] = aval
    return len(avals) - 1

  def constant(aval, value):
    # A function that is called twice has captured its arrays once.
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
) -> tuple[Program, Any]:
  """The program of a function without dead code, and its outputs' structure.

  Args:
    function: of variables and inputs.
    variables: arrays, or their `jax.ShapeDtypeStruct`.
    inputs: likewise; their first axis is the batch.
  """
  closed, shapes = jax.make_jaxpr(function, return_shape=True)(
    variables, inputs
  )
  # Also within loops, which `flatten` leaves whole.
  used = [True] * len(closed.jaxpr.outvars)
  jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, used, instantiate=True)
  program = flatten(
    jex.core.ClosedJaxpr(jaxpr, closed.consts),
    examples=len(jax.tree.leaves(inputs)),
  )
  # A weight that is computed anew at every use is one tensor.
  program = without_repeats(without_dead_code(program), static=True)
  return program, shapes


def is_number(value) -> bool:
  """Whether it is known while tracing, and no array."""
  return np.ndim(value) == 0 and not isinstance(value, jax.Array)


def static_slots(program: Program) -> set[int]:
  """Slots of what does not depend on the examples."""
  static = {*program.constants, *program.variables}
  for equation in program.equations:
    if static.issuperset(equation.inputs):
      static |= set(equation.outputs)
  return static


def without_repeats(program: Program, static: bool = False) -> Program:
  """The program with nothing computed twice.

  Args:
    program: the program.
    static: whether that is asked for of what the inputs do not decide alone.
  """
  same, seen, equations = {}, {}, []
  among = static_slots(program) if static else None

  def is_new(key, slots):
    first = seen.setdefault(key, slots)
    same.update(zip(slots, first, strict=True))
    return first is slots

  for slot, value in program.constants.items():
    if is_number(value):
      # Bytes, for -0.0 is equal to 0.0.
      is_new((str(program.avals[slot]), np.asarray(value).tobytes()), (slot,))
  for equation in program.equations:
    inputs = tuple(same.get(slot, slot) for slot in equation.inputs)
    # A jaxpr does not tell its constants in its text.
    whole = str(equation.params)
    apart = among is not None and not among.issuperset(equation.outputs)
    if apart or equation.eqn.effects or sub_jaxprs(equation.eqn):
      whole = equation.outputs
    if is_new((equation.name, inputs, whole), equation.outputs):
      equations.append(equation._replace(inputs=inputs))
  outputs = tuple(same.get(slot, slot) for slot in program.outputs)
  return program._replace(equations=tuple(equations), outputs=outputs)


def bind(
  equation: Equation, operands: Sequence[jax.Array], **changed
) -> list[jax.Array]:
  """The outputs of an equation as it was traced, but for some parameters."""
  primitive = equation.eqn.primitive
  result = primitive.bind(
    *operands, **primitive.get_bind_params(equation.params | changed)
  )
  return result if primitive.multiple_results else [result]


def read_slots(
  program: Program, outputs: Sequence[int], cut: Container[tuple[int, int]] = ()
) -> set[int]:
  """Slots that have to be known to compute the values in others.

  Args:
    program: what is run.
    outputs: slots whose values are wanted; they are among those returned.
    cut: (place of an equation, operand) that are not read, as something else
      is put there.
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
  """The program without what neither its outputs nor its effects need."""
  effects = [e for e in program.equations if e.eqn.effects]
  slots = [slot for e in effects for slot in (*e.inputs, *e.outputs)]
  wanted = read_slots(program, [*program.outputs, *slots])
  kept = [
    e
    for e in program.equations
    if e.eqn.effects or not wanted.isdisjoint(e.outputs)
  ]
  return program._replace(equations=tuple(kept))


def run_static(
  program: Program, variables: Sequence[jax.Array]
) -> list[jax.Array]:
  """The outputs of a program that reads no examples.

  Args:
    program: from `needed_for`.
    variables: one array for each of `program.variables`.
  """
  return run(program, [*variables, *[None] * len(program.examples)])


def run(
  program: Program,
  arguments: Sequence[jax.Array],
  execute: Callable[[Equation, list[jax.Array]], list[jax.Array]] = bind,
) -> list[jax.Array]:
  """The outputs of a program.

  Args:
    program: what to run.
    arguments: one array for each of `program.inputs`; None will do for one
      that nothing reads.
    execute: (equation, inputs) -> outputs.
  """
  values = dict(program.constants)
  values.update(zip(program.inputs, arguments, strict=True))
  for equation in program.equations:
    operands = [values[slot] for slot in equation.inputs]
    with equation.eqn.ctx.manager:
      results = execute(equation, operands)
    values.update(zip(equation.outputs, results, strict=True))
  return [values[slot] for slot in program.outputs]
