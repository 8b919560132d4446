"""Layers, which are products of images and a weight, and what they see.

A weight is taken as matrices [G, D, C / G]: G groups, D inputs of an output, C
outputs. The inputs of a convolution's are the taps of its window times the
channels of a group.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from nemo_jax.core import batches
from nemo_jax.core.types import Array, PyTree
from nemo_jax.quantization import transform
from nemo_jax.quantization.trace.analysis import Site
from nemo_jax.quantization.trace.program import MATRIX_PRODUCTS, Equation


class Layer(NamedTuple):
  """A product that is understood here: x @ w, or one of NHWC and HWIO."""

  weight: Site
  input: Site
  equation: Equation

  @property
  def groups(self) -> int:
    """Of the channels."""
    return self.equation.params.get('feature_group_count', 1)

  @property
  def taps(self) -> int:
    """Positions of the window."""
    return math.prod(self.equation.eqn.invars[1].aval.shape[:-2])

  def as_matrices(self, weight: Array) -> Array:
    """A weight [..., C], or any array laid out like it, as [G, D, C / G]."""
    flat = weight.reshape(-1, self.groups, weight.shape[-1] // self.groups)
    return jnp.swapaxes(flat, 0, 1)

  def as_weight(self, matrices: Array) -> Array:
    """The inverse of `as_matrices`."""
    shape = self.equation.eqn.invars[1].aval.shape
    return jnp.swapaxes(matrices, 0, 1).reshape(shape)

  def to_inputs(self, channels: Array) -> Array:
    """[G, D]: a value of each channel of the images, for every input."""
    rows = channels.reshape(self.groups, 1, -1)
    return jnp.repeat(rows, self.taps, axis=1).reshape(self.groups, -1)

  def by_channel(self, inputs: Array) -> Array:
    """[taps, channels of the images]: values of every input [G, D]."""
    rows = inputs.reshape(self.groups, self.taps, -1)
    return jnp.swapaxes(rows, 0, 1).reshape(self.taps, -1)

  def multiply(self, images: Array, weight: Array) -> Array:
    """The product as it was traced."""
    primitive = self.equation.eqn.primitive
    return primitive.bind(images, weight, **self.equation.params)


def _is_understood(equation: Equation) -> bool:
  if equation.name not in MATRIX_PRODUCTS:
    return False
  numbers = equation.params['dimension_numbers']
  if equation.name == 'dot_general':
    (left, right), batched = numbers
    shapes = [v.aval.shape for v in equation.eqn.invars]
    last = (len(shapes[0]) - 1,)
    plain = batched == ((), ()) and (tuple(left), tuple(right)) == (last, (0,))
    return plain and len(shapes[1]) == 2
  rank = len(numbers.lhs_spec)
  inner = tuple(range(1, rank - 1))
  layout = (0, rank - 1, *inner), (rank - 1, rank - 2, *range(rank - 2))
  return (
    (tuple(numbers.lhs_spec), tuple(numbers.rhs_spec)) == layout
    and tuple(numbers.out_spec) == layout[0]
    and equation.params['batch_group_count'] == 1
    and set(equation.params['lhs_dilation']) == {1}
    and all(min(pair) >= 0 for pair in equation.params['padding'])
  )


def find(quantized: transform.Quantized) -> list[Layer]:
  """The layers that are understood, of weights that are used once."""
  quantizers, by_operation = quantized.quantizers, {}
  for site in quantized.analysis.sites:
    by_operation.setdefault(site.operation, {})[site.operand] = site
  uses = [site.quantizer for site in quantized.analysis.sites]
  layers = []
  for name, operands in by_operation.items():
    equation = quantized.program.equations[quantized.analysis.places[name]]
    if set(operands) != {0, 1} or not _is_understood(equation):
      continue
    weight = quantizers[operands[1].quantizer]
    single = uses.count(operands[1].quantizer) == 1
    if (
      weight.is_weight
      and single
      and not quantizers[operands[0].quantizer].is_weight
    ):
      layers.append(Layer(operands[1], operands[0], equation))
  return layers


class Moments(NamedTuple):
  """Of what meets each row of a weight, over images and output positions."""

  count: Array  # float32[]
  total: Array  # float32[G, D], their sum
  square: Array  # float32[G, D, D], the sum of their outer products
  low: Array  # float32[G, D], the least
  high: Array  # float32[G, D]

  def __add__(self, other: 'Moments') -> 'Moments':
    """Those of both samples."""
    return Moments(
      self.count + other.count,
      self.total + other.total,
      self.square + other.square,
      jnp.minimum(self.low, other.low),
      jnp.maximum(self.high, other.high),
    )

  def divided(self, factors: Array) -> 'Moments':
    """Those of the inputs over positive factors [G, D]."""
    return Moments(
      self.count,
      self.total / factors,
      self.square / factors[:, :, None] / factors[:, None, :],
      self.low / factors,
      self.high / factors,
    )


def _rows(layer: Layer, images: Array) -> Array:
  """[G, n, D]: the inputs of each output, at all n positions of all images."""
  if layer.equation.name == 'dot_general':
    return images.reshape(1, -1, images.shape[-1])
  params = layer.equation.params
  window = layer.equation.eqn.invars[1].aval.shape[:-2]
  steps = zip(
    window, params['rhs_dilation'], params['window_strides'], strict=True
  )
  edges = [(low, high, 0) for low, high in params['padding']]
  zero = jnp.zeros((), images.dtype)
  images = jax.lax.pad(images, zero, [(0, 0, 0), *edges, (0, 0, 0)])
  spans = []
  for size, (taps, dilation, stride) in zip(
    images.shape[1:-1], steps, strict=True
  ):
    last = size - (taps - 1) * dilation
    spans.append(
      [slice(i * dilation, i * dilation + last, stride) for i in range(taps)]
    )
  parts = [
    images[(slice(None), *(s[i] for s, i in zip(spans, index, strict=True)))]
    for index in np.ndindex(*window)
  ]
  taps = jnp.stack(parts, axis=-2)  # [B, ..., taps, channels]
  groups, channels = layer.groups, taps.shape[-1] // layer.groups
  taps = taps.reshape(-1, len(parts), groups, channels)
  return jnp.moveaxis(taps, 2, 0).reshape(groups, len(taps), -1)


def _moments_of(layer: Layer, images: Array) -> Moments:
  rows = _rows(layer, images.astype(jnp.float32))
  return Moments(
    count=jnp.float32(rows.shape[1]),
    total=jnp.sum(rows, axis=1),
    square=jax.lax.dot_general(rows, rows, (((1,), (1,)), ((0,), (0,)))),
    low=jnp.min(rows, axis=1),
    high=jnp.max(rows, axis=1),
  )


def watch(quantized, variables, inputs, layers, look, add, chunk, title):
  """What `look` makes of the input of every layer, over all examples.

  Args:
    quantized: from `quantize`; the network runs in float.
    variables: its weights.
    inputs: a pytree of arrays [B, ...].
    layers: from `find`.
    look: (layer, input of the layer) -> a pytree of arrays.
    add: (a pytree, one of further examples) -> that of both.
    chunk: examples at once.
    title: of the progress bar.

  Returns:
    {layer's weight site: the pytree}.
  """
  by_input = {layer.input: layer for layer in layers}

  @jax.jit
  def see(variables, part):
    seen = {}

    def visit(site, value):
      if site in by_input:
        layer = by_input[site]
        seen[layer.weight] = look(layer, value)
      return value, None

    quantized.map_operands(variables, part, visit)
    return seen

  join = lambda a, b: {site: add(a[site], b[site]) for site in a}
  join = jax.jit(join, donate_argnums=0)
  total = None
  starts = range(0, batches.size(inputs), chunk)
  for start in tqdm.tqdm(starts, desc=title, unit='chunk', disable=None):
    part = batches.take(inputs, slice(start, start + chunk))
    seen = see(variables, batches.on_device(part))
    total = seen if total is None else join(total, seen)
  return total


def collect_moments(
  quantized: transform.Quantized,
  variables: PyTree,
  inputs: PyTree,
  layers: list[Layer],
  chunk: int,
) -> dict[Site, Moments]:
  """The moments of the input of every layer, by the site of its weight.

  Args:
    quantized: from `quantize`; the network runs in float.
    variables: its weights.
    inputs: a pytree of arrays [B, ...].
    layers: from `find`.
    chunk: examples at once.
  """
  return watch(
    quantized,
    variables,
    inputs,
    layers,
    _moments_of,
    Moments.__add__,
    chunk,
    'second moments',
  )
