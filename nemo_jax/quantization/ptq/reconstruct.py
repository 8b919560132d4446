"""Reconstruction: codes of weights with little error in the outputs of layers.

One pass over examples collects, for every layer, the mean and the second
moments of the inputs of its weight. They give the error that quantization of
the weight makes in the layer's output, without the examples. The codes are
chosen to make it small, layer by layer and for all widths at once.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import tqdm

from nemo_jax.core.types import Array, ArrayLike, InputError, PyTree
from nemo_jax.quantization import transform
from nemo_jax.quantization.numerics import ranges as ranges_lib
from nemo_jax.quantization.numerics.bank import Bank
from nemo_jax.quantization.numerics.widths import CODED as WIDTHS
from nemo_jax.quantization.ptq import activation_ranges, equalize, rounding
from nemo_jax.quantization.ptq import layers as layers_lib
from nemo_jax.quantization.ptq.layers import Layer, Moments
from nemo_jax.quantization.trace import tracing
from nemo_jax.quantization.trace.analysis import Site

STEPS = ('equalization', 'activations', 'scales', 'rounding', 'bias')
# Equalization helps where only activations are narrow, and harms elsewhere.
DEFAULT_STEPS = ('activations', 'scales', 'rounding', 'bias')


def check_steps(steps: Sequence[str]) -> None:
  """Raises `InputError` for a step that is not one of STEPS."""
  for step in steps:
    if step not in STEPS:
      raise InputError(
        f'unknown step {step!r}; the choices are {", ".join(STEPS)}'
      )


def _symmetric_layers(quantized: transform.Quantized) -> list[Layer]:
  """The layers whose weights have a scale for each output channel."""
  return [
    layer
    for layer in layers_lib.find(quantized)
    if quantized.quantizers[layer.weight.quantizer].channel_axes
    and quantized.bank.ranges[layer.weight.quantizer].scale[0].size > 1
  ]


def _equalize(
  chosen: Iterable[tuple[Layer, bool]],
  weights: dict[Site, ArrayLike],
  moments: dict[Site, Moments],
) -> tuple[dict[Site, Array], dict[Site, Moments], dict[Site, Array]]:
  """Equalized weights as matrices, moments of inputs, and the equalizers.

  Args:
    chosen: layers, and whether they are equalized.
    weights: of the layers.
    moments: moments of their inputs.
  """
  matrices, divided, equalizers = {}, {}, {}
  for layer, free in chosen:
    site, weight = layer.weight, weights[layer.weight].astype(jnp.float32)
    matrices[site], divided[site] = layer.as_matrices(weight), moments[site]
    if not free:
      continue
    channels = equalize.factors(layer, weight, moments[site])
    spread = layer.to_inputs(channels)
    full = jnp.broadcast_to(spread[..., None], matrices[site].shape)
    equalizers[site] = layer.as_weight(full)
    equalizers[layer.input] = 1 / channels
    matrices[site] = matrices[site] * spread[..., None]
    divided[site] = moments[site].divided(spread)
  return matrices, divided, equalizers


def reconstruct(
  quantized: transform.Quantized,
  variables: PyTree,
  inputs: PyTree,
  *,
  steps: Sequence[str] = DEFAULT_STEPS,
  chunk: int = 16,
) -> transform.Quantized:
  """The network with a bank that has less error in the outputs of its layers.

  Codes are chosen for symmetric weights of convolutions and dense layers. Other
  weights, and those that are used more than once, are rounded to nearest as
  before.

  Args:
    quantized: from `quantize`.
    variables: of the network.
    inputs: a pytree of arrays [B, ...], a sample; about a thousand examples are
      enough.
    steps: any of STEPS. `equalization` gives the channels of a tensor between
      two layers similar ranges, see `equalize`. `activations` weights the
      squared error of an activation by the weights that it is multiplied with,
      where that leaves less error in the output, see `activation_ranges`.
      `scales` weights the squared error of a weight, which its scale minimises,
      by the power of its input. `rounding` chooses codes by the error in the
      layer's output, see `rounding`; on these inputs it is never larger than
      with rounding to nearest. `bias` corrects the mean of that error (Nagel et
      al. 2019).
    chunk: examples that are run at once.

  Raises:
    InputError: a step is unknown, there is no example, or variables or inputs
      are not arrays.
  """
  check_steps(steps)
  tracing.check_arguments(variables, inputs)
  layers = _symmetric_layers(quantized)
  moments = layers_lib.collect_moments(
    quantized, variables, inputs, layers, chunk
  )
  weights = quantized.weights(variables)
  free = equalize.free_layers(quantized, layers)
  free = free if 'equalization' in steps else []
  chosen = [(layer, layer in free) for layer in layers]
  matrices, moments, equalizers = _equalize(chosen, weights, moments)

  ranges = list(quantized.bank.ranges)
  by_output = 'activations' in steps
  consumers = {
    quantizer: group
    for quantizer, group in activation_ranges.by_quantizer(
      quantized, layers
    ).items()
    if by_output or group[0] in free
  }
  found = activation_ranges.find(
    quantized,
    variables,
    inputs,
    consumers,
    moments,
    matrices,
    equalizers,
    by_output=by_output,
    chunk=chunk,
  )
  for quantizer, table in found.items():
    ranges[quantizer] = table

  codes, shifts = {}, {}
  for layer in tqdm.tqdm(
    layers, desc='reconstruction', unit='layer', disable=None
  ):
    site, seen = layer.weight, moments[layer.weight]
    index = site.quantizer
    if 'scales' in steps or layer in free:
      axes = quantized.quantizers[index].channel_axes
      power = seen if 'scales' in steps else None
      ranges[index] = _weight_range(layer, matrices[site], axes, power)
    codes[site], shifts[site] = _codes(
      layer, matrices[site], seen, ranges[index], tuple(steps)
    )
  return quantized.with_bank(Bank(tuple(ranges), codes, shifts, equalizers))


def _weight_range(
  layer: Layer,
  matrices: Array,
  channel_axes: tuple[int, ...],
  moments: Moments | None,
) -> ranges_lib.Range:
  """The range of a weight, with errors weighted by the power of its input.

  Args:
    layer: the layer.
    matrices: its weight as matrices [G, D, C / G].
    channel_axes: axes of the weight with a scale for each index.
    moments: moments of the input; None to weight all errors equally.
  """
  power: Any = 1.0
  if moments is not None:
    power = jnp.diagonal(moments.square, axis1=1, axis2=2) / moments.count
    power = jnp.broadcast_to(power[..., None], matrices.shape)
    power = layer.as_weight(power)
  return ranges_lib.weight_range(
    layer.as_weight(matrices), channel_axes, power=power
  )


def _codes(
  layer: Layer,
  matrices: Array,
  moments: Moments,
  table: ranges_lib.Range,
  steps: tuple[str, ...],
) -> tuple[Array, Array]:
  """Codes of a weight and shifts, with a row for each of WIDTHS.

  Args:
    layer: the layer.
    matrices: its weight as matrices [G, D, C / G].
    moments: moments of the input.
    table: range of the weight.
    steps: see `reconstruct`.
  """
  scales = table.scale[: len(WIDTHS)]
  zero = table.zero_point[: len(WIDTHS)].reshape(len(WIDTHS), -1)[:, 0]
  last = jnp.asarray([2.0**b - 1 for b in WIDTHS])
  shape = (len(WIDTHS), *layer.as_weight(matrices).shape)
  spread = jax.vmap(layer.as_matrices)(jnp.broadcast_to(scales, shape))
  groups, depth = matrices.shape[:2]
  held, shift = rounding.codes_and_shifts(
    matrices,
    moments,
    jnp.moveaxis(spread[:, :, :1], 1, 0),  # [G, K, 1, C]
    -zero,
    last - zero,
    at_once=max(1, min(groups, 2**20 // depth**2)),
    steps=steps,
  )
  codes = jax.vmap(layer.as_weight, in_axes=1)(held)
  return codes, jnp.swapaxes(shift, 0, 1).reshape(scales.shape)
