"""What a program quantizes: its quantizers, operations and where they apply."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nemo_jax.quantization import operations as operations_lib
from nemo_jax.quantization import program as program_lib

# Primitives that move values about and make none of their own.
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
# Those that do so for a tensor with one scale and an exact zero.
_ACTIVATION_VIEWS = ('pad', 'reduce_window_max', 'slice')


class Quantizer(NamedTuple):
  """A tensor that is stored in a bit-width of its own."""

  name: str  # the weight's path, or its first consumer's and the operand
  is_weight: bool
  channel_axes: tuple[int, ...]  # of the operand: axes with a scale an index
  channels: int  # indices along those axes, 1 without
  elements: int  # in the tensor; for an activation, of one image


class Site(NamedTuple):
  """An operand of an equation that a quantizer applies to."""

  equation: int
  operand: int
  quantizer: int


class Analysis(NamedTuple):
  """All that quantization needs to know of a program."""

  quantizers: tuple[Quantizer, ...]
  operations: tuple[operations_lib.Operation, ...]
  sites: tuple[Site, ...]
  kept: tuple[int, ...]  # variables that stay in float, by leaf index


class _Value(NamedTuple):
  """What is known of the value in a slot."""

  dynamic: bool  # depends on the images
  root: int  # the slot whose values it holds, perhaps in another shape
  view: tuple  # the steps from there to here
  sources: frozenset  # equations of the nearest operations upstream
  leaves: frozenset  # variables it is computed from


def _zeros(program: program_lib.Program) -> set[int]:
  """Slots that hold a constant zero, also one that was converted from it."""
  zeros = set()
  for slot, value in program.constants.items():
    aval = program.avals[slot]
    is_number = aval.shape == () and jnp.issubdtype(aval.dtype, jnp.number)
    # NumPy compares captured arrays at once, where JAX would trace; traced
    # ones could be anything.
    if is_number and not isinstance(value, jax.core.Tracer):
      zeros |= {slot} if np.asarray(value) == 0 else set()
  for equation in program.equations:
    if equation.name == 'convert_element_type' and equation.inputs[0] in zeros:
      zeros |= set(equation.outputs)
  return zeros


def _is_view(equation, value: _Value, avals, zeros: set[int]) -> bool:
  """Whether the output holds the first input's values, and zeros at most."""
  slots = (equation.inputs[0], *equation.outputs)
  dtypes = [getattr(avals[s], 'dtype', None) for s in slots]
  if not all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes):
    return False
  if equation.name == 'pad':
    return value.dynamic and equation.inputs[1] in zeros
  views = _VIEWS + _ACTIVATION_VIEWS if value.dynamic else _VIEWS
  return equation.name in views


def _is_add(equation, values: list[_Value], avals) -> bool:
  """A sum of two branches; x + f(x) within one activation function is none."""
  if equation.name not in ('add', 'add_any'):
    return False
  shapes = {avals[slot].shape for slot in equation.inputs}
  branches = {value.sources for value in values}
  return (
    all(v.dynamic for v in values) and len(shapes) == 1 and len(branches) == 2
  )


def _propagate(
  program: program_lib.Program, num_leaves: int, also: Sequence[str]
) -> tuple[dict[int, _Value], list[int]]:
  """What is known of every slot, and the equations whose operands to quantize.

  Raises:
    NotImplementedError: see `analyze`.
  """
  values, consumers, zeros = {}, [], _zeros(program)
  for slot in program.constants:
    values[slot] = _Value(False, slot, (), frozenset(), frozenset())
  for i, slot in enumerate(program.inputs):
    leaves = frozenset([i]) if i < num_leaves else frozenset()
    values[slot] = _Value(i >= num_leaves, slot, (), frozenset(), leaves)

  for index, equation in enumerate(program.equations):
    ins = [values[slot] for slot in equation.inputs]
    dynamic = any(v.dynamic for v in ins)
    sources = frozenset().union(*(v.sources for v in ins))
    leaves = frozenset().union(*(v.leaves for v in ins))
    products = program_lib.matrix_products(equation.eqn) if dynamic else []
    consumes = False
    if products and equation.name not in program_lib.MATRIX_PRODUCTS:
      raise NotImplementedError(
        f"cannot quantize through '{equation.name}', which holds a matrix "
        f'product of the images ({products[0]}). Matrix products are reached '
        'at the top level and inside jit, remat and custom derivatives; '
        'unroll the loop or call the layer directly.'
      )
    if products:
      consumes = True
    elif dynamic and 'add' in also:
      consumes = _is_add(equation, ins, program.avals)
    if dynamic and 'pool' in also:
      shape = program.avals[equation.inputs[0]].shape
      consumes |= operations_lib.is_pool(equation, shape)
    if consumes:
      consumers.append(index)
      sources = frozenset([index])
    for slot in equation.outputs:
      values[slot] = _Value(dynamic, slot, (), sources, leaves)
      if ins and _is_view(equation, ins[0], program.avals, zeros):
        step = (equation.name, str(equation.params))
        view = (*ins[0].view, step)
        values[slot] = ins[0]._replace(view=view)
  return values, consumers


def _unique(name: str, taken: set[str]) -> str:
  """The name, numbered if it is taken already; takes it."""
  unique, repeat = name, 1
  while unique in taken:
    repeat += 1
    unique = f'{name}#{repeat}'
  taken.add(unique)
  return unique


def analyze(
  program: program_lib.Program,
  leaf_names: Sequence[str],
  batch: int,
  also: Sequence[str] = (),
) -> Analysis:
  """The quantizers of a program and the operations that consume them.

  A weight is an operand of a convolution or matrix product that does not
  depend on the images; an activation is one that does. A tensor that several
  operations consume has one quantizer, also when they see it in other shapes;
  a weight seen in several layouts has one scale, else one per output channel.

  Args:
    program: flattened `apply(variables, images)`, one input a leaf.
    leaf_names: names of the variables' leaves, the first inputs.
    batch: number of images, which counts per image are divided by.
    also: of OPTIONAL_KINDS; operations beside matrix products whose operands
      are quantized too.

  Raises:
    NotImplementedError: a matrix product of the images lies where it cannot
      be reached, such as the body of a `scan`.
  """
  avals, taken, taken_by_operations = program.avals, set(), set()
  values, consumers = _propagate(program, len(leaf_names), also)
  order = {equation: i for i, equation in enumerate(consumers)}
  index_of, layouts = {}, {}  # by root slot; by quantizer
  quantizers, operations, sites, absorbed = [], [], [], set()

  def weight_name(value: _Value) -> str:
    if not value.leaves:
      return 'constant'
    # A weight computed from several variables goes by the largest.
    sizes = {i: math.prod(avals[program.inputs[i]].shape) for i in value.leaves}
    return leaf_names[max(sorted(sizes), key=sizes.get)]

  def quantizer_of(value: _Value, name: str) -> int:
    if value.root not in index_of:
      index_of[value.root] = len(quantizers)
      elements = math.prod(avals[value.root].shape)
      elements //= batch if value.dynamic else 1
      name = _unique(name, taken)
      quantizers.append(Quantizer(name, not value.dynamic, (), 1, elements))
    return index_of[value.root]

  for index in consumers:
    equation = program.equations[index]
    ins = [values[slot] for slot in equation.inputs]
    product = equation.name in program_lib.MATRIX_PRODUCTS
    active = [i for i, v in enumerate(ins) if v.dynamic]
    static = [i for i, v in enumerate(ins) if product and not v.dynamic]
    weight = static[0] if static else None
    facts = operations_lib.facts(equation, avals, batch, weight)
    name = facts['kind']
    if static:
      name = weight_name(ins[weight])
      name = name.rpartition('/')[0] or name
    name = _unique(name, taken_by_operations)
    tails = ('input',) if len(active) == 1 else ('lhs', 'rhs')
    ids = []
    for i, tail in zip(active, tails, strict=True):
      ids.append(quantizer_of(ins[i], f'{name}:{tail}'))
    for i in static:
      ids.append(quantizer_of(ins[i], weight_name(ins[i])))
      axes = operations_lib.channel_axes(equation, i)
      shape = avals[equation.inputs[i]].shape
      channels = math.prod(shape[a] for a in axes)
      layouts.setdefault(ids[-1], set()).add((axes, channels, ins[i].view))
      absorbed |= ins[i].leaves
    sites += [
      Site(index, i, q) for i, q in zip(active + static, ids, strict=True)
    ]
    operations.append(
      operations_lib.Operation(
        name=name,
        operands=tuple(ids),
        sources=tuple(
          tuple(sorted(order[e] for e in ins[i].sources)) for i in active
        ),
        parameters=quantizers[ids[-1]].elements if static else 0,
        **facts,
      )
    )

  for quantizer, seen in layouts.items():
    axes, channels, _ = next(iter(seen)) if len(seen) == 1 else ((), 1, ())
    quantizers[quantizer] = quantizers[quantizer]._replace(
      channel_axes=axes, channels=channels
    )
  kept = tuple(i for i in range(len(leaf_names)) if i not in absorbed)
  return Analysis(tuple(quantizers), tuple(operations), tuple(sites), kept)
