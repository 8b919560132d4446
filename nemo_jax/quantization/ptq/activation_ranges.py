"""Ranges of activations, by the error that they leave in a layer's output."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from nemo_jax.core import batches
from nemo_jax.core.types import Array, PyTree
from nemo_jax.quantization import transform
from nemo_jax.quantization.numerics import fake_quant, observe
from nemo_jax.quantization.numerics import ranges as ranges_lib
from nemo_jax.quantization.numerics import widths as widths_lib
from nemo_jax.quantization.ptq.layers import Layer, Moments, watch
from nemo_jax.quantization.trace.analysis import Site


def by_quantizer(
  quantized: transform.Quantized, layers: list[Layer]
) -> dict[int, list[Layer]]:
  """The layers that consume each activation that nothing else consumes."""
  uses = [site.quantizer for site in quantized.analysis.sites]
  found = {}
  for layer in layers:
    found.setdefault(layer.input.quantizer, []).append(layer)
  return {q: ls for q, ls in found.items() if uses.count(q) == len(ls)}


def _bounds(consumers, moments) -> tuple[Array, Array]:
  low = functools.reduce(
    jnp.minimum, (jnp.min(moments[x.weight].low) for x in consumers)
  )
  high = functools.reduce(
    jnp.maximum, (jnp.max(moments[x.weight].high) for x in consumers)
  )
  return low, high


def find(
  quantized: transform.Quantized,
  variables: PyTree,
  inputs: PyTree,
  consumers: dict[int, list[Layer]],
  moments: dict[Site, Moments],
  matrices: dict[Site, Array],
  equalizers: dict[Site, Array],
  *,
  by_output: bool,
  chunk: int,
) -> dict[int, ranges_lib.Range]:
  """Least-squares ranges of activations, by quantizer.

  The squared error of a value counts alike, or as much as the weights that it
  meets make of it: the sum of their squares, which is what is left of the error
  in the layer's output if those of channels are independent. Of the two ranges
  of a width the one is taken that leaves less error in the outputs themselves.

  Args:
    quantized: from `quantize`.
    variables: its weights.
    inputs: a pytree of arrays [B, ...].
    consumers: from `by_quantizer`.
    moments: of the layers' inputs, equalized.
    matrices: [G, D, C / G] of the layers, equalized.
    equalizers: what inputs are multiplied by before they are quantized.
    by_output: whether errors are weighed; else they count alike.
    chunk: examples at once.
  """
  if not consumers:
    return {}
  layers = [layer for group in consumers.values() for layer in group]
  limits = {
    layer.weight: _bounds(group, moments)
    for group in consumers.values()
    for layer in group
  }
  see = functools.partial(watch, quantized, variables)
  equalized = functools.partial(_equalized, equalizers)
  count = _counter(layers, limits, matrices, equalized, by_output)
  counts = see(inputs, layers, count, jnp.add, chunk, 'histograms')
  tables = {}
  search = jax.jit(
    jax.vmap(ranges_lib.activation_range, in_axes=(None, None, 0))
  )
  for quantizer, group in tqdm.tqdm(
    consumers.items(), desc='ranges', unit='tensor', disable=None
  ):
    total = sum(counts[layer.weight] for layer in group)
    tables[quantizer] = search(*limits[group[0].weight], total)
  if not by_output:
    return {q: jax.tree.map(lambda x: x[0], t) for q, t in tables.items()}
  few = batches.take(inputs, slice(4 * chunk))
  measure = _errors(tables, matrices, equalized)
  errors = see(few, layers, measure, jnp.add, chunk, 'output errors')
  return {
    quantizer: _better(
      tables[quantizer], sum(errors[layer.weight] for layer in group)
    )
    for quantizer, group in consumers.items()
  }


def _equalized(
  equalizers: dict[Site, Array], layer: Layer, value: Array
) -> Array:
  """The input of a layer as it is before it is quantized."""
  factor = equalizers.get(layer.input)
  return value if factor is None else value * factor


def _counter(layers, limits, matrices, equalized, by_output: bool):
  """(layer, input) -> its histograms: of values alike, and by importance."""
  importance = {
    layer.weight: jnp.sum(
      layer.by_channel(jnp.sum(matrices[layer.weight] ** 2, axis=-1)), axis=0
    )
    for layer in layers
  }

  def count(layer, value):
    value = equalized(layer, value).astype(jnp.float32)
    weights = [None, importance[layer.weight]] if by_output else [None]
    return jnp.stack(
      [observe.histogram(value, *limits[layer.weight], w) for w in weights]
    )

  return count


def _errors(tables, matrices, equalized):
  """(layer, input) -> [2, K], squared errors of its output by both tables."""
  widths = jnp.asarray(widths_lib.CODED)

  def errors(layer, value):
    value = equalized(layer, value)
    weight = layer.as_weight(matrices[layer.weight])
    table = tables[layer.input.quantizer]

    def one(pair):
      row, bits = pair
      scale, zero = jax.tree.map(lambda x: x[row], table).at(bits)
      gap = fake_quant.fake_quant(value, scale, zero, bits) - value
      return jnp.sum(layer.multiply(gap, weight) ** 2)

    pairs = [x.ravel() for x in jnp.meshgrid(jnp.arange(2), widths)]
    found = jax.lax.map(one, jnp.stack(pairs, axis=1))
    return found.reshape(len(widths), 2).T

  return errors


def _better(tables: ranges_lib.Range, errors: Array) -> ranges_lib.Range:
  """Of two tables, row by row, the one with less error [2, K]."""
  rows = np.zeros(len(widths_lib.WIDTHS), int)
  rows[: len(widths_lib.CODED)] = np.argmin(np.asarray(errors), axis=0)
  index = np.arange(len(rows))
  return jax.tree.map(lambda x: x[rows, index], tables)
