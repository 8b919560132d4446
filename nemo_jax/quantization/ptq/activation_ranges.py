"""Ranges of activations with the least error in the outputs of layers."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jaxtyping import Float

from nemo_jax.core import batches
from nemo_jax.core.types import Array, ArrayLike, PyTree
from nemo_jax.quantization import transform
from nemo_jax.quantization.numerics import fake_quant, observe
from nemo_jax.quantization.numerics import ranges as ranges_lib
from nemo_jax.quantization.numerics import widths as widths_lib
from nemo_jax.quantization.ptq.layers import Layer, Moments, watch
from nemo_jax.quantization.trace.analysis import Site


def by_quantizer(
  quantized: transform.Quantized, layers: list[Layer]
) -> dict[int, list[Layer]]:
  """The layers that consume an activation, by its quantizer.

  Activations that other operations consume too are left out.
  """
  uses = [site.quantizer for site in quantized.analysis.sites]
  found: dict[int, list[Layer]] = {}
  for layer in layers:
    found.setdefault(layer.input.quantizer, []).append(layer)
  return {q: ls for q, ls in found.items() if uses.count(q) == len(ls)}


def _bounds(
  consumers: list[Layer], moments: dict[Site, Moments]
) -> tuple[Array, Array]:
  """The least and the greatest value of the input of some layers."""
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

  With `by_output`, there are two candidates at each width: the range of least
  squared error, and that of least weighted squared error. The weight of a value
  is the sum of the squares of the weights that it is multiplied with; so the
  weighted error is that in the layer's output, if the errors of channels are
  independent. The candidate with less squared error in the output itself, on
  the first 4 * `chunk` examples, is returned.

  Args:
    quantized: from `quantize`.
    variables: of the network.
    inputs: a pytree of arrays [B, ...].
    consumers: from `by_quantizer`.
    moments: moments of the layers' inputs, equalized.
    matrices: weights of the layers as matrices [G, D, C / G], equalized.
    equalizers: what inputs are multiplied by before they are quantized.
    by_output: whether the errors in outputs decide; else the range is that of
      least squared error.
    chunk: examples that are run at once.
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
  equalizers: dict[Site, Array], layer: Layer, value: ArrayLike
) -> ArrayLike:
  """The input of a layer as it is when it is quantized."""
  factor = equalizers.get(layer.input)
  return value if factor is None else value * factor


def _counter(
  layers: list[Layer],
  limits: dict[Site, tuple[Array, Array]],
  matrices: dict[Site, Array],
  equalized: Callable[[Layer, ArrayLike], ArrayLike],
  by_output: bool,
) -> Callable[[Layer, ArrayLike], Array]:
  """A function (layer, input) -> histograms of the input, by row.

  The first is without weights. With `by_output` there is a second one, in which
  the values of a channel are weighted; see `find`.
  """
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


def _errors(
  tables: dict[int, ranges_lib.Range],
  matrices: dict[Site, Array],
  equalized: Callable[[Layer, ArrayLike], ArrayLike],
) -> Callable[[Layer, ArrayLike], Array]:
  """A function (layer, input) -> [2, K] squared errors of its output.

  There is one for each of two ranges of its input, at each of K widths.

  Args:
    tables: both ranges of each quantizer, stacked.
    matrices: weights of the layers, equalized.
    equalized: (layer, input) -> input as it is quantized.
  """
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


def _better(
  tables: ranges_lib.Range, errors: Float[ArrayLike, '2 K']
) -> ranges_lib.Range:
  """The range with less error of two, chosen for each width.

  Args:
    tables: both ranges, stacked.
    errors: of both, at the widths `widths.CODED`; beyond them the first is
      taken.
  """
  rows = np.zeros(len(widths_lib.WIDTHS), int)
  rows[: len(widths_lib.CODED)] = np.argmin(np.asarray(errors), axis=0)
  index = np.arange(len(rows))
  return jax.tree.map(lambda x: x[rows, index], tables)
