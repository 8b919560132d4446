"""Layers, products of an activation and a weight, and moments of their inputs.

A weight is written as matrices [G, D, C / G] with G groups, C outputs, and D
inputs for each output. For a convolution, D is the number of taps of the window
times the channels of a group. In annotations, O is C / G.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jaxtyping import Float, Shaped

from nemo_jax.core import batches
from nemo_jax.core.types import Array, ArrayLike, PyTree
from nemo_jax.quantization import transform
from nemo_jax.quantization.trace.analysis import Site
from nemo_jax.quantization.trace.equations import MATRIX_PRODUCTS, Equation


class Layer(NamedTuple):
  """A product x @ w, or a convolution of layouts NHWC and HWIO of any rank."""

  weight: Site
  input: Site
  equation: Equation

  @property
  def groups(self) -> int:
    """Number of groups, G."""
    return self.equation.params.get('feature_group_count', 1)

  @property
  def taps(self) -> int:
    """Number of positions in the window."""
    return math.prod(self.equation.in_avals[1].shape[:-2])

  def as_matrices(
    self, weight: Shaped[ArrayLike, '... C']
  ) -> Shaped[Array, 'G D O']:
    """A weight, or an array of its shape, as matrices [G, D, C / G]."""
    flat = weight.reshape(-1, self.groups, weight.shape[-1] // self.groups)
    return jnp.swapaxes(flat, 0, 1)

  def as_weight(
    self, matrices: Shaped[Array, 'G D O']
  ) -> Shaped[Array, '... C']:
    """Matrices in the shape of the weight; the inverse of `as_matrices`."""
    shape = self.equation.in_avals[1].shape
    return jnp.swapaxes(matrices, 0, 1).reshape(shape)

  def to_inputs(
    self, channels: Shaped[Array, ' channels']
  ) -> Shaped[Array, 'G D']:
    """Values of the input's channels, repeated for every input of an output."""
    rows = channels.reshape(self.groups, 1, -1)
    return jnp.repeat(rows, self.taps, axis=1).reshape(self.groups, -1)

  def by_channel(
    self, inputs: Shaped[Array, 'G D']
  ) -> Shaped[Array, 'taps channels']:
    """Values of every input of an output, by tap and channel of the input."""
    rows = inputs.reshape(self.groups, self.taps, -1)
    return jnp.swapaxes(rows, 0, 1).reshape(self.taps, -1)

  def multiply(
    self, inputs: Shaped[ArrayLike, '...'], weight: Shaped[ArrayLike, '...']
  ) -> Shaped[Array, '...']:
    """The product of other operands, as it was traced."""
    primitive = self.equation.eqn.primitive
    return primitive.bind(inputs, weight, **self.equation.params)


def _is_understood(equation: Equation) -> bool:
  """Whether it is a product that `Layer` describes."""
  if equation.name not in MATRIX_PRODUCTS:
    return False
  numbers = equation.params['dimension_numbers']
  if equation.name == 'dot_general':
    (left, right), batched = numbers
    shapes = [aval.shape for aval in equation.in_avals]
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
  """The layers of a network whose weights are used once.

  Products that `Layer` does not describe are left out.
  """
  quantizers = quantized.quantizers
  by_operation: dict[str, dict[int, Site]] = {}
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
  """Moments of the inputs of a layer's outputs.

  They are over all examples and output positions, for each of D inputs.
  """

  count: Float[Array, '']  # number of positions
  total: Float[Array, 'G D']  # sum of the inputs
  square: Float[Array, 'G D D']  # sum of their outer products
  low: Float[Array, 'G D']  # the least
  high: Float[Array, 'G D']  # the greatest

  def joined(self, other: 'Moments') -> 'Moments':
    """The moments of both samples."""
    return Moments(
      self.count + other.count,
      self.total + other.total,
      self.square + other.square,
      jnp.minimum(self.low, other.low),
      jnp.maximum(self.high, other.high),
    )

  def divided(self, factors: Float[Array, 'G D']) -> 'Moments':
    """The moments of the inputs divided by positive factors."""
    return Moments(
      self.count,
      self.total / factors,
      self.square / factors[:, :, None] / factors[:, None, :],
      self.low / factors,
      self.high / factors,
    )


def _rows(layer: Layer, images: ArrayLike) -> Array:
  """The inputs of each output [G, n, D], at all n positions of all images.

  Args:
    layer: a layer.
    images: its input, of any number of spatial axes; [..., D] for x @ w.
  """
  if layer.equation.name == 'dot_general':
    return jnp.reshape(images, (1, -1, images.shape[-1]))
  params = layer.equation.params
  window = layer.equation.in_avals[1].shape[:-2]
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


def _moments_of(layer: Layer, images: ArrayLike) -> Moments:
  """The moments of a layer's input."""
  rows = _rows(layer, images.astype(jnp.float32))
  return Moments(
    count=jnp.float32(rows.shape[1]),
    total=jnp.sum(rows, axis=1),
    square=jax.lax.dot_general(rows, rows, (((1,), (1,)), ((0,), (0,)))),
    low=jnp.min(rows, axis=1),
    high=jnp.max(rows, axis=1),
  )


def watch(
  quantized: transform.Quantized,
  variables: PyTree,
  inputs: PyTree,
  layers: list[Layer],
  look: Callable[[Layer, ArrayLike], PyTree],
  add: Callable[[Any, Any], PyTree],
  chunk: int,
  title: str,
) -> dict[Site, PyTree]:
  """Statistics of the input of every layer, by the site of its weight.

  Args:
    quantized: from `quantize`; the network runs in float.
    variables: of the network.
    inputs: a pytree of arrays [B, ...].
    layers: from `find`.
    look: (layer, its input for some examples) -> statistics, a pytree of
      arrays.
    add: (statistics, statistics of other examples) -> statistics of both.
    chunk: examples that are run at once.
    title: title of the progress bar.
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

  @functools.partial(jax.jit, donate_argnums=0)
  def join(a, b):
    return {site: add(a[site], b[site]) for site in a}

  total = None
  starts = range(0, batches.size(inputs), chunk)
  for start in tqdm.tqdm(starts, desc=title, unit='chunk', disable=None):
    part = batches.take(inputs, slice(start, start + chunk))
    seen = see(variables, batches.on_device(part))
    total = seen if total is None else join(total, seen)
  assert total is not None  # there is at least one example
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
    variables: of the network.
    inputs: a pytree of arrays [B, ...].
    layers: from `find`.
    chunk: examples that are run at once.
  """
  return watch(
    quantized,
    variables,
    inputs,
    layers,
    _moments_of,
    Moments.joined,
    chunk,
    'second moments',
  )
