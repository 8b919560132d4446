"""Operations that consume quantized tensors, and counts from their shapes."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxtyping import Shaped

from nemo_jax.core.types import ArrayLike
from nemo_jax.quantization.trace.equations import Equation

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
  """An operation that consumes quantized tensors."""

  name: str
  kind: str  # one of KINDS
  operands: tuple[int, ...]  # quantizers of activations, then of a weight
  # For each activation, the operations that its values come from.
  sources: tuple[tuple[int, ...], ...]
  macs: int  # multiply-accumulates for one example; 0 for add and pool
  in_channels: int
  out_channels: int
  positions: int  # output pixels of one example
  kernel: int  # taps of the window
  stride: int
  parameters: int  # elements of the weight


def is_pool(equation: Equation, shape: tuple[int, ...]) -> bool:
  """Whether it sums over windows, or over all spatial axes of images.

  Args:
    equation: any equation.
    shape: of its first operand.
  """
  if equation.name == 'reduce_window_sum':
    return True
  axes, rank = tuple(equation.params.get('axes', ())), len(shape)
  spatial = [tuple(range(1, rank - 1)), tuple(range(2, rank))]
  spatial = spatial[:1] if rank == 3 else spatial
  return equation.name == 'reduce_sum' and rank >= 3 and axes in spatial


def channel_axes(equation: Equation, operand: int) -> tuple[int, ...]:
  """Axes of a weight that are output channels, and not summed over.

  Args:
    equation: a matrix product.
    operand: which of its inputs is the weight.
  """
  numbers = equation.params['dimension_numbers']
  if equation.name == 'conv_general_dilated':
    return (numbers.rhs_spec[0],) if operand == 1 else ()
  contracted = numbers[0][operand]
  rank = len(equation.in_avals[operand].shape)
  return tuple(a for a in range(rank) if a not in contracted)


def output_scale(
  equation: Equation, operand: int, scale: Shaped[ArrayLike, '...']
) -> Shaped[ArrayLike, '...']:
  """Scale of an operand of a matrix product, reshaped to scale the output.

  Args:
    equation: the product.
    operand: which of its two inputs has the scale.
    scale: one number, or one for each index of `channel_axes` with the other
      axes of size 1.
  """
  if scale.size == 1:
    return scale.reshape(())
  shape = scale.shape
  numbers = equation.params['dimension_numbers']
  rank = len(equation.out_avals[0].shape)
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


def _conv_facts(
  equation: Equation, avals: Mapping[int, Any], batch: int
) -> dict[str, Any]:
  """The facts of a convolution; see `facts`."""
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


def _dot_facts(
  equation: Equation, avals: Mapping[int, Any], batch: int, weight: int
) -> dict[str, Any]:
  """The facts of another matrix product; see `facts`."""
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


def _plain_facts(
  equation: Equation, avals: Mapping[int, Any], batch: int
) -> dict[str, Any]:
  """The facts of an addition or a pooling, which multiply nothing."""
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


def facts(
  equation: Equation, avals: Mapping[int, Any], batch: int, weight: int | None
) -> dict[str, Any]:
  """The fields of an `Operation` that follow from shapes.

  Args:
    equation: the equation of the operation.
    avals: shape and dtype of the value in each slot of the program.
    batch: number of examples.
    weight: which operand is a weight; None if none is.
  """
  if equation.name == 'conv_general_dilated':
    found = _conv_facts(equation, avals, batch)
  elif equation.name == 'dot_general':
    found = _dot_facts(equation, avals, batch, 1 if weight is None else weight)
  else:
    return _plain_facts(equation, avals, batch)
  return found if weight is not None else found | {'kind': 'matmul'}
