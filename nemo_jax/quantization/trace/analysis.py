"""What a program quantizes: its quantizers, operations and where they apply."""

import math
from collections.abc import Container, Sequence
from typing import NamedTuple

import numpy as np

from nemo_jax.quantization.trace import operations as operations_lib
from nemo_jax.quantization.trace import program as program_lib
from nemo_jax.quantization.trace import values as values_lib
from nemo_jax.quantization.trace.values import Value, Variable, weight_name

# What reads a part of an array at places that are known.
_SLICES = ('slice', 'squeeze', 'reshape')


class Quantizer(NamedTuple):
  """A tensor that is stored in a bit-width of its own."""

  name: str  # the weight's path, or its first consumer's and the operand
  is_weight: bool
  channel_axes: tuple[int, ...]  # of the operand: axes with a scale an index
  channels: int  # indices along those axes, 1 without
  elements: int  # in the tensor; for an activation, of one image


class Site(NamedTuple):
  """An operand that a quantizer applies to, whatever the trace numbers it."""

  operation: str  # the name of what consumes it
  operand: int
  quantizer: int


class Stored(NamedTuple):
  """A variable or a captured array that is read as it is."""

  elements: int  # that are read
  dtype: np.dtype


class Analysis(NamedTuple):
  """All that quantization needs to know of a program."""

  quantizers: tuple[Quantizer, ...]
  operations: tuple[operations_lib.Operation, ...]
  sites: tuple[Site, ...]
  places: dict[str, int]  # the equation of each operation of a site
  fixed: tuple[str, ...]  # products with what is computed, not stored
  stored: tuple[Stored, ...]  # what is read in float
  unread: tuple[int, ...]  # variables that nothing reads, by leaf index
  roots: tuple[int, ...]  # the slot of the tensor of each quantizer
  # Axes of weights along which they are repeated for every image.
  repeated: dict[Site, tuple[int, ...]] = {}

  def slot(self, program: program_lib.Program, site: Site) -> int:
    """The slot of an operand in the program that was analyzed."""
    return program.equations[self.places[site.operation]].inputs[site.operand]


def _unique(name: str, taken: Container[str]) -> str:
  """The name, numbered if it is taken already."""
  unique, repeat = name, 1
  while unique in taken:
    repeat += 1
    unique = f'{name}#{repeat}'
  return unique


class _Finder:
  """Quantizers that were found so far, and the operands that they apply to."""

  def __init__(self, program, values, variables, batch: int):
    self.program, self.values = program, values
    self.variables, self.batch = variables, batch
    self.quantizers, self.sites = [], []
    self.places, self.index_of = {}, {}  # of operations; by root slot
    self.layouts = {}  # of weights: (channel axes, channels, view)
    self.names = set()  # that are taken

  def quantizer(self, value: Value, name: str) -> int:
    """The quantizer of a tensor, which is new or has been met."""
    if value.root not in self.index_of:
      self.index_of[value.root] = len(self.quantizers)
      elements = math.prod(self.program.avals[value.root].shape)
      elements //= self.batch if value.dynamic else 1
      name = _unique(name, self.names)
      self.names.add(name)
      is_weight = not value.dynamic
      self.quantizers.append(Quantizer(name, is_weight, (), 1, elements))
    return self.index_of[value.root]

  def operation(self, index: int, order: dict[int, int]):
    """The operation that an equation is; its operands become sites.

    Args:
      index: of the equation.
      order: the number of the operation at each equation.
    """
    equation = self.program.equations[index]
    ins = [self.values[slot] for slot in equation.inputs]
    product = equation.name in program_lib.MATRIX_PRODUCTS
    active = [i for i, v in enumerate(ins) if v.dynamic]
    static = [i for i, v in enumerate(ins) if product and not v.dynamic]
    weight = static[0] if static else None
    facts = operations_lib.facts(
      equation, self.program.avals, self.batch, weight
    )
    name = facts['kind']
    if static:
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
    """(equation, operand) of weights: what is read there is quantized."""
    return {
      (self.places[site.operation], site.operand)
      for site in self.sites
      if self.quantizers[site.quantizer].is_weight
    }

  def other_uses(self) -> None:
    """Makes sites of what reads a weight and is no product of it.

    A table may be looked up and multiplied: it is stored once, quantized.
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
        # A view is quantized where it is read in turn.
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


def _sliced(equation, array: np.ndarray) -> np.ndarray:
  """What one of _SLICES makes of an array."""
  params = equation.params
  if equation.name != 'slice':
    return array.reshape(equation.eqn.outvars[0].aval.shape)
  starts, ends = params['start_indices'], params['limit_indices']
  steps = params['strides'] or (1,) * len(starts)
  return array[tuple(map(slice, starts, ends, steps))]


def _stored(program, cut) -> tuple[Stored, ...]:
  """The variables and captured arrays that are not quantized.

  Of an array that is only read in slices, what these hold counts.
  """
  read = program_lib.read_slots(program, program.outputs, cut)
  users = {}
  for place, equation in enumerate(program.equations):
    if not read.isdisjoint(equation.outputs):
      for i, slot in enumerate(equation.inputs):
        if (place, i) not in cut:
          users.setdefault(slot, []).append(equation)

  def places(slot, own: np.ndarray) -> np.ndarray:
    """Which of the elements `own` of an array are read."""
    by = users.get(slot, [])
    if slot in program.outputs or not all(e.name in _SLICES for e in by):
      return own.ravel()
    parts = [_sliced(e, own) for e in by]
    found = [places(e.outputs[0], x) for e, x in zip(by, parts, strict=True)]
    return np.unique(np.concatenate(found))

  def elements(slot) -> int:
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
  program: program_lib.Program,
  leaf_names: Sequence[str],
  batch: int,
  extra_ops: Sequence[str] = (),
) -> Analysis:
  """The quantizers of a program and the operations that consume them.

  A weight is an operand of a convolution or matrix product that does not
  depend on the inputs; an activation is one that does. A tensor that several
  operations consume has one quantizer, also when they see it in other shapes;
  a weight seen in several layouts has one scale, else one per output channel.
  What else reads a weight sees the quantized one. Products that sum over no
  axis, or over one index and have no variable, are multiplications; a product
  with what is computed from sizes, such as an interpolation, is no layer.

  Args:
    program: flattened `apply(variables, inputs)`, one input a leaf, without
      dead code.
    leaf_names: names of the variables' leaves, the first inputs.
    batch: number of examples, which counts per image are divided by.
    extra_ops: of OPTIONAL_KINDS; operations beside matrix products whose
      operands are quantized too.

  Raises:
    InputError: a product of the inputs is one of complex numbers, or has a
      weight of whole numbers.
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
