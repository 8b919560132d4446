"""What a program computes: its operations, quantizers and data-flow graph."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import jraph
import numpy as np

from nemo_jax.quantization import program as program_lib

KINDS = (
  'conv',
  'depthwise',
  'pointwise',
  'grouped',
  'dense',
  'matmul',
  'add',
  'pool',
)
OPTIONAL_KINDS = ('add', 'pool')

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
  elements: int  # in the tensor; for an activation, of one image


class Operation(NamedTuple):
  """A step that consumes quantized tensors."""

  name: str
  kind: str  # one of KINDS
  operands: tuple[int, ...]  # quantizers, in order of the operands
  sources: tuple[int, ...]  # operations whose results reach this one
  macs: int  # multiply-accumulates for one image; 0 for add and pool
  in_channels: int
  out_channels: int
  positions: int  # output pixels of one image
  kernel: int  # taps of the window
  stride: int
  parameters: int


class Site(NamedTuple):
  """An operand of an equation that a quantizer applies to."""

  equation: int
  operand: int
  quantizer: int


class Analysis(NamedTuple):
  """All that quantization needs to know of a program."""

  quantizers: tuple[Quantizer, ...]
  operations: tuple[Operation, ...]
  sites: tuple[Site, ...]
  kept: tuple[int, ...]  # variables that stay in float, by leaf index


class _Value(NamedTuple):
  """What is known of the value in a slot."""

  dynamic: bool  # depends on the images
  root: int  # the slot whose values it holds, perhaps in another shape
  view: tuple  # the steps from there to here
  sources: frozenset  # equations of the nearest operations upstream
  leaves: frozenset  # variables it is computed from


def _is_view(equation, value: _Value, program: program_lib.Program) -> bool:
  """Whether the output holds the first input's values, and zeros at most."""
  slots = (equation.inputs[0], *equation.outputs)
  dtypes = [getattr(program.avals[s], 'dtype', None) for s in slots]
  if not all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes):
    return False
  if equation.name == 'pad':
    padding = program.constants.get(equation.inputs[1])
    return value.dynamic and padding is not None and padding == 0
  views = _VIEWS + _ACTIVATION_VIEWS if value.dynamic else _VIEWS
  return equation.name in views


def _is_pool(equation, aval) -> bool:
  """A sum over windows, or over every spatial axis of a batch of images."""
  if equation.name == 'reduce_window_sum':
    return True
  axes, rank = tuple(equation.params.get('axes', ())), len(aval.shape)
  spatial = [tuple(range(1, rank - 1)), tuple(range(2, rank))]
  spatial = spatial[:1] if rank == 3 else spatial
  return equation.name == 'reduce_sum' and rank >= 3 and axes in spatial


def _conv_facts(equation, avals, batch: int) -> dict:
  lhs, rhs = (avals[s].shape for s in equation.inputs)
  out = avals[equation.outputs[0]].shape
  params = equation.params
  numbers = params['dimension_numbers']
  out_channels, per_group = (rhs[i] for i in numbers.rhs_spec[:2])
  taps = math.prod(rhs[i] for i in numbers.rhs_spec[2:])
  groups = params['feature_group_count']
  in_channels = lhs[numbers.lhs_spec[1]]
  if groups == 1:
    kind = 'pointwise' if taps == 1 else 'conv'
  else:
    kind = 'depthwise' if groups == in_channels else 'grouped'
  # Positions between the inputs of a transposed convolution cost nothing.
  dilation = math.prod(params['lhs_dilation'])
  return {
    'kind': kind,
    'macs': math.prod(out) * taps * per_group // dilation // batch,
    'in_channels': in_channels,
    'out_channels': out_channels,
    'positions': math.prod(out[i] for i in numbers.out_spec[2:]),
    'kernel': taps,
    'stride': max(params['window_strides'], default=1),
  }


def _dot_facts(equation, avals, batch: int) -> dict:
  lhs, rhs = (avals[s].shape for s in equation.inputs)
  out = math.prod(avals[equation.outputs[0]].shape)
  (contract, contract_rhs), (_, batch_rhs) = equation.params[
    'dimension_numbers'
  ]
  depth = math.prod(lhs[i] for i in contract)
  free = set(range(len(rhs))) - {*contract_rhs, *batch_rhs}
  out_channels = math.prod(rhs[i] for i in free)
  return {
    'kind': 'dense',
    'macs': out * depth // batch,
    'in_channels': depth,
    'out_channels': out_channels,
    'positions': max(out // out_channels // batch, 1),
    'kernel': 1,
    'stride': 1,
  }


def _plain_facts(equation, avals, batch: int) -> dict:
  """For an addition or a pooling, which multiply nothing."""
  shape, out = (avals[s].shape for s in (equation.inputs[0], *equation.outputs))
  size, out_size = math.prod(shape) // batch, math.prod(out) // batch
  channels = out[-1] if len(out) > 1 else 1
  kernel = max(size // max(out_size, 1), 1)
  return {
    'kind': 'add' if equation.name in ('add', 'add_any') else 'pool',
    'macs': 0,
    'in_channels': channels,
    'out_channels': channels,
    'positions': max(out_size // channels, 1),
    'kernel': kernel,
    'stride': max(equation.params.get('window_strides', (1,))),
  }


def _channel_axes(equation, operand: int) -> tuple[int, ...]:
  """Axes of a weight along which outputs are told apart."""
  numbers = equation.params['dimension_numbers']
  if equation.name == 'conv_general_dilated':
    return (numbers.rhs_spec[0],) if operand == 1 else ()
  (contracted, batched) = (pair[operand] for pair in numbers)
  rank = len(equation.eqn.invars[operand].aval.shape)
  return tuple(a for a in range(rank) if a not in {*contracted, *batched})


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
  values, consumers = {}, []
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
      consumes |= _is_pool(equation, program.avals[equation.inputs[0]])
    if consumes:
      consumers.append(index)
      sources = frozenset([index])
    for slot in equation.outputs:
      values[slot] = _Value(dynamic, slot, (), sources, leaves)
      if ins and _is_view(equation, ins[0], program):
        step = (equation.name, str(equation.params))
        view = (*ins[0].view, step)
        values[slot] = ins[0]._replace(view=view)
  return values, consumers


def _facts(equation, avals, batch: int, has_weight: bool) -> dict:
  """The fields of an `Operation` that follow from shapes."""
  if equation.name == 'conv_general_dilated':
    facts = _conv_facts(equation, avals, batch)
  elif equation.name == 'dot_general':
    facts = _dot_facts(equation, avals, batch)
  else:
    return _plain_facts(equation, avals, batch)
  return facts if has_weight else facts | {'kind': 'matmul'}


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
      quantizers.append(Quantizer(name, not value.dynamic, (), elements))
    return index_of[value.root]

  for index in consumers:
    equation = program.equations[index]
    ins = [values[slot] for slot in equation.inputs]
    product = equation.name in program_lib.MATRIX_PRODUCTS
    active = [i for i, v in enumerate(ins) if v.dynamic]
    static = [i for i, v in enumerate(ins) if product and not v.dynamic]
    facts = _facts(equation, avals, batch, bool(static))
    name = facts['kind']
    if static:
      weight = weight_name(ins[static[0]])
      name = weight.rpartition('/')[0] or weight
    name = _unique(name, taken_by_operations)
    tails = ('input',) if len(active) == 1 else ('lhs', 'rhs')
    ids = []
    for i, tail in zip(active, tails, strict=True):
      ids.append(quantizer_of(ins[i], f'{name}:{tail}'))
    for i in static:
      ids.append(quantizer_of(ins[i], weight_name(ins[i])))
      layout = (_channel_axes(equation, i), ins[i].view)
      layouts.setdefault(ids[-1], set()).add(layout)
      absorbed |= ins[i].leaves
    sites += [
      Site(index, i, q) for i, q in zip(active + static, ids, strict=True)
    ]
    sources = frozenset().union(*(ins[i].sources for i in active))
    operations.append(
      Operation(
        name=name,
        operands=tuple(ids),
        sources=tuple(sorted(order[i] for i in sources)),
        parameters=quantizers[ids[-1]].elements if static else 0,
        **facts,
      )
    )

  for quantizer, seen in layouts.items():
    axes = next(iter(seen))[0] if len(seen) == 1 else ()
    quantizers[quantizer] = quantizers[quantizer]._replace(channel_axes=axes)
  kept = tuple(i for i in range(len(leaf_names)) if i not in absorbed)
  return Analysis(tuple(quantizers), tuple(operations), tuple(sites), kept)


def _node_features(analysis: Analysis) -> np.ndarray:
  """float32[N, F]: what NEMO's searchers see of each quantizer.

  The kind of the first operation that consumes it, one-hot; whether it is a
  weight; whether the operation is depthwise; and, as log(1 + x) scaled to at
  most 1 over the network, the input and output channels, output positions,
  kernel taps, stride, parameters and MACs; last its place in the order.
  """
  first = {}
  for operation in analysis.operations:
    for quantizer in operation.operands:
      first.setdefault(quantizer, operation)
  rows, sizes = [], []
  for i, quantizer in enumerate(analysis.quantizers):
    op = first[i]
    one_hot = [float(op.kind == kind) for kind in KINDS]
    rows.append([*one_hot, quantizer.is_weight, op.kind == 'depthwise'])
    counts = (op.in_channels, op.out_channels, op.positions, op.kernel)
    sizes.append([*counts, op.stride, op.parameters, op.macs, i])
  sizes = np.log1p(np.asarray(sizes, np.float64))
  sizes[:, -1] = np.arange(len(rows))
  sizes /= np.maximum(sizes.max(axis=0), 1e-9)
  return np.concatenate([np.asarray(rows), sizes], axis=1).astype(np.float32)


def _graph(nodes: np.ndarray, edges: Sequence[tuple[int, int]]):
  senders, receivers = np.asarray(edges, np.int32).reshape(-1, 2).T
  return jraph.GraphsTuple(
    nodes=nodes,
    edges=None,
    senders=senders,
    receivers=receivers,
    globals=None,
    n_node=np.asarray([len(nodes)], np.int32),
    n_edge=np.asarray([len(senders)], np.int32),
  )


def sequential_graph(analysis: Analysis) -> jraph.GraphsTuple:
  """NEMO's graph: one node a quantizer, chained in order of execution."""
  count = len(analysis.quantizers)
  chain = list(zip(range(count), range(1, count), strict=False))
  return _graph(_node_features(analysis), chain)


def data_flow_graph(analysis: Analysis) -> jraph.GraphsTuple:
  """One node a quantizer, with the edges along which data really flows.

  Within an operation the activation leads to the weight; between operations
  the last operand of the producer leads to the activations of the consumer.
  On a network without branches this is the sequential graph.
  """
  edges = []
  for op in analysis.operations:
    weights = [q for q in op.operands if analysis.quantizers[q].is_weight]
    active = [q for q in op.operands if q not in weights]
    edges += [(a, w) for a in active for w in weights]
    for source in op.sources:
      producer = analysis.operations[source].operands
      edges += [(producer[-1], a) for a in active]
  return _graph(_node_features(analysis), sorted(set(edges)))
