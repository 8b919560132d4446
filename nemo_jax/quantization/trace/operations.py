"""Operations that consume quantized tensors, and what their shapes tell."""

import math
from typing import NamedTuple

from nemo_jax.core.types import Array

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


class Operation(NamedTuple):
  """A step that consumes quantized tensors."""

  name: str
  kind: str  # one of KINDS
  operands: tuple[int, ...]  # quantizers: of activations, then of a weight
  sources: tuple[
    tuple[int, ...], ...
  ]  # operations that lead to each activation
  macs: int  # multiply-accumulates for one image; 0 for add and pool
  in_channels: int
  out_channels: int
  positions: int  # output pixels of one image
  kernel: int  # taps of the window
  stride: int
  parameters: int


def is_pool(equation, shape: tuple[int, ...]) -> bool:
  """A sum over windows, or over every spatial axis of a batch of images."""
  if equation.name == 'reduce_window_sum':
    return True
  axes, rank = tuple(equation.params.get('axes', ())), len(shape)
  spatial = [tuple(range(1, rank - 1)), tuple(range(2, rank))]
  spatial = spatial[:1] if rank == 3 else spatial
  return equation.name == 'reduce_sum' and rank >= 3 and axes in spatial


def channel_axes(equation, operand: int) -> tuple[int, ...]:
  """Axes of a weight along which outputs are told apart."""
  numbers = equation.params['dimension_numbers']
  if equation.name == 'conv_general_dilated':
    return (numbers.rhs_spec[0],) if operand == 1 else ()
  contracted = numbers[0][operand]
  rank = len(equation.eqn.invars[operand].aval.shape)
  return tuple(a for a in range(rank) if a not in contracted)


def output_scale(equation, operand: int, scale: Array) -> Array:
  """A scale of one operand of a matrix product, laid out for its output.

  Args:
    equation: the product.
    operand: which of its two inputs.
    scale: one number, or one for each index of `channel_axes`, with the other
      axes of size 1.
  """
  if scale.size == 1:
    return scale.reshape(())
  shape = scale.shape
  numbers = equation.params['dimension_numbers']
  rank = len(equation.eqn.outvars[0].aval.shape)
  if equation.name == 'conv_general_dilated':
    return scale.reshape(
      [-1 if axis == numbers.out_spec[1] else 1 for axis in range(rank)]
    )
  contracted, batched = (sides[operand] for sides in numbers)
  free = [a for a in range(len(shape)) if a not in {*contracted, *batched}]
  # Outputs have the batch axes first, then what is free on either side.
  others = [1] * (rank - len(batched) - len(free))
  sizes = [shape[a] for a in free]
  sizes = others + sizes if operand else sizes + others
  order = (*batched, *free, *contracted)
  return scale.transpose(order).reshape(*(shape[a] for a in batched), *sizes)


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


def _dot_facts(equation, avals, batch: int, weight: int) -> dict:
  contracted, batched = equation.params['dimension_numbers']
  shape = avals[equation.inputs[weight]].shape
  out = math.prod(avals[equation.outputs[0]].shape)
  depth = math.prod(shape[i] for i in contracted[weight])
  free = set(range(len(shape))) - {*contracted[weight], *batched[weight]}
  out_channels = math.prod(shape[i] for i in free)
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


def facts(equation, avals, batch: int, weight: int | None) -> dict:
  """The fields of an `Operation` that follow from shapes.

  Args:
    equation: what consumes the tensors.
    avals: shape and dtype in each slot of the program.
    batch: number of examples.
    weight: which operand is a weight, None if none is.
  """
  if equation.name == 'conv_general_dilated':
    found = _conv_facts(equation, avals, batch)
  elif equation.name == 'dot_general':
    found = _dot_facts(equation, avals, batch, 1 if weight is None else weight)
  else:
    return _plain_facts(equation, avals, batch)
  return found if weight is not None else found | {'kind': 'matmul'}
