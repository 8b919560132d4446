"""Analysis of a program: its quantizers, operations and where they apply."""

import math
from collections.abc import Container, Sequence
from typing import Any, NamedTuple

import numpy as np

from nemo_jax.quantization.trace import operations as operations_lib
from nemo_jax.quantization.trace import program as program_lib
from nemo_jax.quantization.trace import values as values_lib
from nemo_jax.quantization.trace.equations import MATRIX_PRODUCTS, Equation
from nemo_jax.quantization.trace.program import Program
from nemo_jax.quantization.trace.values import Value, Variable, weight_name

# Primitives that read a part of an array at fixed positions.
_SLICES = ('slice', 'squeeze', 'reshape')


class Quantizer(NamedTuple):
  """A tensor that has a bit-width of its own."""

  name: str  # path of the weight, or name of the first consumer and operand
  is_weight: bool
  # Axes of the operand with a scale for each index.
  channel_axes: tuple[int, ...]
  channels: int  # number of scales: indices along those axes, 1 without axes
  elements: int  # in the tensor; of an activation, for one example


class Site(NamedTuple):
  """An operand that a quantizer applies to.

  It is the same in all traces of a function, however they number their slots.
  """

  operation: str  # name of the operation that consumes it
  operand: int  # index among the operands
  quantizer: int  # index of the quantizer


class Stored(NamedTuple):
  """A variable or a captured array that is not quantized."""

  elements: int  # number that are read
  dtype: np.dtype


class Analysis(NamedTuple):
  """Everything that quantization needs to know of a program."""

  quantizers: tuple[Quantizer, ...]
  operations: tuple[operations_lib.Operation, ...]
  sites: tuple[Site, ...]
  places: dict[str, int]  # index of the equation of each site's operation
  fixed: tuple[str, ...]  # matrix products that are no layers, as text
  stored: tuple[Stored, ...]  # arrays that are not quantized
  unread: tuple[int, ...]  # indices of the variables that nothing reads
  roots: tuple[int, ...]  # slot of the tensor of each quantizer
  # Axes of weights along which they are repeated for every example.
  repeated: dict[Site, tuple[int, ...]] = {}

  def slot(self, program: Program, site: Site) -> int:
    """The slot of a site's operand in the program that was analyzed."""
    return program.equations[self.places[site.operation]].inputs[site.operand]


def _unique(name: str, taken: Container[str]) -> str:
  """The name, with a number if it is taken already."""
  unique, repeat = name, 1
  while unique in taken:
    repeat += 1
    unique = f'{name}#{repeat}'
  return unique


class _Finder:
  """Collects the quantizers and sites of a program.

  Attributes:
    quantizers: those found so far; channels of weights are set at the end.
    sites: those found so far.
    places: index of the equation of each operation.
    index_of: index of the quantizer of a tensor, by its root slot.
    layouts: (channel axes, channels, view) of a weight at each of its uses, by
      the index of the quantizer.
    names: names of quantizers that are taken.
  """

  def __init__(
    self,
    program: Program,
    values: dict[int, Value],
    variables: Sequence[Variable],
    batch: int,
  ):
    self.program, self.values = program, values
    self.variables, self.batch = variables, batch
    self.quantizers: list[Quantizer] = []
    self.sites: list[Site] = []
    self.places: dict[str, int] = {}
    self.index_of: dict[int, int] = {}
    self.layouts: dict[int, set[Any]] = {}
    self.names: set[str] = set()

  def quantizer(self, value: Value, name: str) -> int:
    """The index of a tensor's quantizer, which is added if it is new."""
    if value.root not in self.index_of:
      self.index_of[value.root] = len(self.quantizers)
      elements = math.prod(self.program.avals[value.root].shape)
      elements //= self.batch if value.dynamic else 1
      name = _unique(name, self.names)
      self.names.add(name)
      is_weight = not value.dynamic
      self.quantizers.append(Quantizer(name, is_weight, (), 1, elements))
    return self.index_of[value.root]

  def operation(
    self, index: int, order: dict[int, int]
  ) -> operations_lib.Operation:
    """The operation of an equation; its operands are added to the sites.

    Args:
      index: index of the equation.
      order: index of the operation of each equation that is one.
    """
    equation = self.program.equations[index]
    ins = [self.values[slot] for slot in equation.inputs]
    product = equation.name in MATRIX_PRODUCTS
    active = [i for i, v in enumerate(ins) if v.dynamic]
    static = [i for i, v in enumerate(ins) if product and not v.dynamic]
    weight = static[0] if static else None
    facts = operations_lib.facts(
      equation, self.program.avals, self.batch, weight
    )
    name = facts['kind']
    if weight is not None:
      name = weight_name(ins[weight], self.variables)
      name = name.rpartition('/')[0] or name
    name = _unique(name, self.places.keys())
    self.places[name] = index
    tails = ('input',) if len(active) == 1 else ('lhs', 'rhs')
    ids = [
      self.quantizer(ins[i], f'{name}:{tail}')
      for i, tail in zip(active, tails, strict=True)
    ]
    for i in static:
      ids.append(self.quantizer(ins[i], weight_name(ins[i], self.variables)))
      axes = operations_lib.channel_axes(equation, i)
      shape = self.program.avals[equation.inputs[i]].shape
      channels = math.prod(shape[a] for a in axes)
      layout = (axes, channels, ins[i].view)
      self.layouts.setdefault(ids[-1], set()).add(layout)
    self.sites += [
      Site(name, i, q) for i, q in zip(active + static, ids, strict=True)
    ]
    return operations_lib.Operation(
      name=name,
      operands=tuple(ids),
      sources=tuple(
        tuple(sorted(order[e] for e in ins[i].sources)) for i in active
      ),
      parameters=self.quantizers[ids[-1]].elements if static else 0,
      **facts,
    )

  def cut(self) -> set[tuple[int, int]]:
    """(equation, operand) pairs at which a quantized weight is read."""
    return {
      (self.places[site.operation], site.operand)
      for site in self.sites
      if self.quantizers[site.quantizer].is_weight
    }

  def other_uses(self) -> None:
    """Adds sites for equations that read a weight and are no products.

    For example, a table may be both looked up and multiplied. It is stored
    once, quantized, so the lookup reads quantized values too.
    """
    program, values, cut = self.program, self.values, self.cut()
    read = program_lib.read_slots(program, program.outputs, cut)
    for place, equation in enumerate(program.equations):
      if read.isdisjoint(equation.outputs):
        continue
      for i, slot in enumerate(equation.inputs):
        index = self.index_of.get(values[slot].root)
        if values[slot].dynamic or index is None or (place, i) in cut:
          continue
        # A view of the weight is quantized where the view is read.
        if values[equation.outputs[0]].root == values[slot].root:
          continue
        name = f'{self.quantizers[index].name}:{equation.name}'
        name = _unique(name, self.places.keys())
        self.places[name] = place
        self.sites.append(Site(name, i, index))
        views = {
          (*layout[:2], values[slot].view) for layout in self.layouts[index]
        }
        self.layouts[index] |= views


def _sliced(equation: Equation, array: np.ndarray) -> np.ndarray:
  """The output of one of _SLICES for an array."""
  params = equation.params
  if equation.name != 'slice':
    return array.reshape(equation.out_avals[0].shape)
  starts, ends = params['start_indices'], params['limit_indices']
  steps = params['strides'] or (1,) * len(starts)
  return array[tuple(map(slice, starts, ends, steps))]


def _stored(program: Program, cut: set[tuple[int, int]]) -> tuple[Stored, ...]:
  """The variables and captured arrays that are not quantized.

  Of an array that is only read in slices, the elements in these are counted.

  Args:
    program: the program.
    cut: (equation, operand) pairs at which a quantized weight is read.
  """
  read = program_lib.read_slots(program, program.outputs, cut)
  users: dict[int, list[Equation]] = {}
  for place, equation in enumerate(program.equations):
    if not read.isdisjoint(equation.outputs):
      for i, slot in enumerate(equation.inputs):
        if (place, i) not in cut:
          users.setdefault(slot, []).append(equation)

  def places(slot: int, own: np.ndarray) -> np.ndarray:
    """Those of the elements `own` of an array that are read."""
    by = users.get(slot, [])
    if slot in program.outputs or not all(e.name in _SLICES for e in by):
      return own.ravel()
    parts = [_sliced(e, own) for e in by]
    found = [places(e.outputs[0], x) for e, x in zip(by, parts, strict=True)]
    return np.unique(np.concatenate(found))

  def elements(slot: int) -> int:
    shape = program.avals[slot].shape
    if not any(e.name in _SLICES for e in users.get(slot, [])):
      return math.prod(shape)
    return len(places(slot, np.arange(math.prod(shape)).reshape(shape)))

  arrays = [
    slot
    for slot, value in program.constants.items()
    if not program_lib.is_number(value)
  ]
  slots = [slot for slot in (*program.variables, *arrays) if slot in read]
  return tuple(Stored(elements(s), program.avals[s].dtype) for s in slots)


def analyze(
  program: Program,
  leaf_names: Sequence[str],
  batch: int,
  extra_ops: Sequence[str] = (),
) -> Analysis:
  """The quantizers of a program and the operations that consume them.

  A weight is an operand of a convolution or matrix product that does not
  depend on the inputs; an activation is one that does. A tensor that several
  operations consume has one quantizer, even if they read it in different
  shapes. A weight that is read in several layouts has one scale, any other one
  for each output channel. Other equations that read a weight read its quantized
  values too. Products that sum over no axis, or over a single index without a
  variable, are multiplications and not quantized. A product with an operand
  that is computed from sizes, such as an interpolation, is no layer.

  Args:
    program: flattened `apply(variables, inputs)` without dead code; one input
      for each leaf.
    leaf_names: names of the leaves of the variables, the first inputs.
    batch: number of examples; counts are divided by it.
    extra_ops: kinds of `operations.OPTIONAL_KINDS` whose operands are quantized
      besides those of matrix products.

  Raises:
    InputError: a product of the inputs is one of complex numbers, or has a
      weight of integers.
    NotImplementedError: a matrix product of the inputs lies where it cannot
      be reached, such as the body of a `scan`.
  """
  variables = [
    Variable(name, math.prod(program.avals[slot].shape))
    for name, slot in zip(leaf_names, program.variables, strict=True)
  ]
  values, consumers, fixed = values_lib.propagate(program, variables, extra_ops)
  order = {equation: i for i, equation in enumerate(consumers)}
  finder = _Finder(program, values, variables, batch)
  operations = [finder.operation(index, order) for index in consumers]
  finder.other_uses()
  for quantizer, seen in finder.layouts.items():
    axes, channels, _ = next(iter(seen)) if len(seen) == 1 else ((), 1, ())
    finder.quantizers[quantizer] = finder.quantizers[quantizer]._replace(
      channel_axes=axes, channels=channels
    )
  live = program_lib.read_slots(program, program.outputs)
  return Analysis(
    quantizers=tuple(finder.quantizers),
    operations=tuple(operations),
    sites=tuple(finder.sites),
    places=finder.places,
    fixed=tuple(fixed),
    stored=_stored(program, finder.cut()),
    unread=tuple(
      i for i, slot in enumerate(program.variables) if slot not in live
    ),
    roots=tuple(finder.index_of),
  )
