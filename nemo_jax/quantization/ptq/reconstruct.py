"""A bank of quantized weights: the best codes of every layer at every width.

One pass over images collects, for every layer, the mean and the second moments
of what its weight multiplies. With those the error that quantization leaves in
the layer's output is known without the images, and the codes are chosen to make
it small, layer by layer and for all widths at once.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import tqdm

from nemo_jax.core.types import Array, InputError, PyTree
from nemo_jax.quantization import transform
from nemo_jax.quantization.numerics import ranges as ranges_lib
from nemo_jax.quantization.numerics.bank import Bank
from nemo_jax.quantization.numerics.widths import CODED as WIDTHS
from nemo_jax.quantization.ptq import activation_ranges, equalize
from nemo_jax.quantization.ptq import layers as layers_lib
from nemo_jax.quantization.trace import tracing

STEPS = ('equalization', 'activations', 'scales', 'rounding', 'bias')
# Equalization helps where activations alone are narrow, and costs elsewhere.
DEFAULT_STEPS = ('activations', 'scales', 'rounding', 'bias')
# Added to the diagonal of the second moments, as a share of its mean: what was
# not seen in the sample may occur.
DAMPING = 0.01
# Rows of a weight that are rounded before the rest is told.
BLOCK = 128


def _error(square: Array, gap: Array) -> Array:
  """[..., C]: what gap [..., D, C] leaves in the output, squared and summed."""
  return jnp.sum(gap * (square @ gap), axis=-2)


def _nearest_plane(weight, factor, scale, low, high) -> Array:
  """Codes [D, C] whose error the later rows make up for.

  Babai's nearest plane: with R upper triangular and R'R the second moments,
  the error |R (w - q)|^2 is minimised row by row from the last to the first,
  each rounded after it has taken over what the rows behind it left. It is the
  rule of OBQ and GPTQ (Frantar et al. 2022) without an inverse.

  Args:
    weight: [D, C].
    factor: [D, D], R with rows divided by their diagonal.
    scale: [1, C].
    low: least code.
    high: greatest.
  """
  depth, size = len(weight), min(BLOCK, len(weight))
  blocks = -(-depth // size)
  padding = blocks * size - depth
  # In front, where rows come last; they see all others and change none.
  weight = jnp.pad(weight, ((padding, 0), (0, 0)))
  factor = jnp.pad(factor, ((padding, 0), (padding, 0)))

  def round_block(index, carry):
    left, codes = carry
    start = (blocks - 1 - index) * size
    rows = jax.lax.dynamic_slice_in_dim(factor, start, size)
    own = jax.lax.dynamic_slice_in_dim(rows, start, size, axis=1)
    exact = jax.lax.dynamic_slice_in_dim(weight, start, size)
    # Rows that are still to come have left nothing yet.
    goal = exact + rows @ left

    def round_row(i, carry):
      gap, held = carry
      row = size - 1 - i
      value = goal[row] + own[row] @ gap
      code = jnp.clip(jnp.round(value / scale[0]), low, high)
      gap = gap.at[row].set(exact[row] - code * scale[0])
      return gap, held.at[row].set(code)

    zeros = jnp.zeros_like(exact)
    gap, held = jax.lax.fori_loop(0, size, round_row, (zeros, zeros))
    put = functools.partial(
      jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=0
    )
    return put(left, gap), put(codes, held)

  zeros = jnp.zeros_like(weight)
  _, codes = jax.lax.fori_loop(0, blocks, round_block, (zeros, zeros))
  return codes[padding:]


def _reconstruct_group(weight, square, scales, lows, highs) -> Array:
  """[K, D, C]: the better of nearest plane and nearest, for each output.

  Args:
    weight: [D, C].
    square: [D, D], second moments of the inputs.
    scales: [K, 1, C].
    lows: [K], least codes.
    highs: [K].
  """
  diagonal = jnp.diag(square)
  mean = jnp.mean(diagonal)
  # An input that is always zero takes any weight; rounding is as good as any.
  damping = DAMPING * jnp.where(mean > 0, mean, 1.0)
  # Strong inputs go first, that is last, while others can still make up.
  order = jnp.argsort(diagonal)
  damped = square + damping * jnp.eye(len(diagonal))
  factor = jnp.linalg.cholesky(damped[order][:, order], upper=True)
  factor = factor / jnp.diag(factor)[:, None]

  def one(scale, low, high):
    plain = jnp.clip(jnp.round(weight / scale), low, high)
    found = _nearest_plane(weight[order], factor, scale, low, high)
    found = jnp.zeros_like(found).at[order].set(found)
    before, after = (
      _error(square, weight - codes * scale) for codes in (plain, found)
    )
    return jnp.where(after < before, found, plain)

  return jax.vmap(one)(scales, lows, highs)


@functools.partial(jax.jit, static_argnames=('at_once', 'steps'))
def _reconstruct(weight, moments, scales, lows, highs, at_once, steps):
  """Codes [G, K, D, C] int8 and shifts [G, K, C] of one layer."""

  def one(inputs):
    weight, moments, scales = inputs
    mean = moments.total / moments.count
    square = moments.square / moments.count
    if 'bias' in steps:
      # The mean of the error is made up for by a shift, the rest is not.
      square = square - jnp.outer(mean, mean)
    if 'rounding' in steps:
      codes = _reconstruct_group(weight, square, scales, lows, highs)
    else:
      codes = jax.vmap(
        lambda s, low, high: jnp.clip(jnp.round(weight / s), low, high)
      )(scales, lows, highs)
    gap = weight - codes * scales
    shift = jnp.einsum('d,kdc->kc', mean, gap)
    shift = shift if 'bias' in steps else jnp.zeros_like(shift)
    return codes.astype(jnp.int8), shift

  counts = jnp.broadcast_to(moments.count, weight.shape[:1])
  moments = moments._replace(count=counts)
  return jax.lax.map(one, (weight, moments, scales), batch_size=at_once)


def check_steps(steps: Sequence[str]) -> None:
  """Raises `InputError` for a step that there is not."""
  for step in steps:
    if step not in STEPS:
      raise InputError(
        f'unknown step {step!r}; the choices are {", ".join(STEPS)}'
      )


def _equalize(chosen, weights, moments):
  """Matrices, moments and equalizers once inputs are divided by factors."""
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
  """The network with a bank that was chosen by the outputs of its layers.

  Symmetric weights of convolutions and dense layers alone; others, and weights
  that are used more than once, are rounded to nearest as before.

  Args:
    quantized: from `quantize`.
    variables: its weights.
    inputs: a pytree of arrays [B, ...], a sample; about a thousand examples
      are enough.
    steps: `equalization` brings the channels of what lies between two layers
      into ranges that are alike, see `equalize`; `activations` weighs the
      squared error of an activation by what is made of it, where that leaves
      less error in the output, see `activation_ranges`; `scales` weighs the
      squared error of a weight, which its scale minimises, by the power of the
      input it multiplies; `rounding` chooses codes by the error of the layer's
      output (see `_nearest_plane`), never worse than nearest on these inputs;
      `bias` makes up for the mean of that error (Nagel et al. 2019).
    chunk: examples at once.

  Raises:
    InputError: a step is unknown, or there is no example.
  """
  check_steps(steps)
  tracing.check_arguments(variables, inputs)
  quantizers = quantized.quantizers
  layers = [
    layer
    for layer in layers_lib.find(quantized)
    if quantizers[layer.weight.quantizer].channel_axes
    and quantized.bank.ranges[layer.weight.quantizer].scale[0].size > 1
  ]
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
      axes = quantizers[index].channel_axes
      power = seen if 'scales' in steps else None
      ranges[index] = _weight_range(layer, matrices[site], axes, power)
    codes[site], shifts[site] = _codes(
      layer, matrices[site], seen, ranges[index], tuple(steps)
    )
  return quantized.with_bank(Bank(tuple(ranges), codes, shifts, equalizers))


def _weight_range(
  layer: layers_lib.Layer,
  matrices: Array,
  channel_axes: tuple[int, ...],
  moments: layers_lib.Moments | None,
) -> ranges_lib.Range:
  """The range of a weight; by the power of what it multiplies, if given."""
  power = 1.0
  if moments is not None:
    power = jnp.diagonal(moments.square, axis1=1, axis2=2) / moments.count
    power = jnp.broadcast_to(power[..., None], matrices.shape)
    power = layer.as_weight(power)
  return ranges_lib.weight_range(
    layer.as_weight(matrices), channel_axes, power=power
  )


def _codes(
  layer: layers_lib.Layer,
  matrices: Array,
  moments: layers_lib.Moments,
  table: ranges_lib.Range,
  steps: tuple[str, ...],
) -> tuple[Array, Array]:
  """Codes [K, ...] of a weight and shifts [K, ...], at each of WIDTHS."""
  scales = table.scale[: len(WIDTHS)]
  zero = table.zero_point[: len(WIDTHS)].reshape(len(WIDTHS), -1)[:, 0]
  last = jnp.asarray([2.0**b - 1 for b in WIDTHS])
  shape = (len(WIDTHS), *layer.as_weight(matrices).shape)
  spread = jax.vmap(layer.as_matrices)(jnp.broadcast_to(scales, shape))
  groups, depth = matrices.shape[:2]
  held, shift = _reconstruct(
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
