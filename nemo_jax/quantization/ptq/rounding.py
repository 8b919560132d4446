"""Rounding of a layer's weight with little error in the layer's output."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from nemo_jax.core.types import Array, ArrayLike
from nemo_jax.quantization.ptq.layers import Moments

# Added to the diagonal of the second moments, as a share of its mean: inputs
# that do not occur in the sample may occur later.
DAMPING = 0.01
# Rows of a weight that are rounded before the others are corrected for them.
BLOCK = 128


def _error(
  square: Float[Array, 'D D'], gap: Float[Array, '*k D C']
) -> Float[Array, '*k C']:
  """Squared error of each output, for errors `gap` of the weight."""
  return jnp.sum(gap * (square @ gap), axis=-2)


def nearest_plane(
  weight: Float[ArrayLike, 'D C'],
  factor: Float[ArrayLike, 'D D'],
  scale: Float[ArrayLike, '1 C'],
  low: Any,
  high: Any,
) -> Float[Array, 'D C']:
  """Codes of a weight by Babai's nearest plane.

  With R upper triangular and R'R the second moments, the error |R (w - q)|^2 is
  minimised row by row from the last to the first. Each row is rounded after it
  was corrected for the errors of the rows below it. This is the rule of OBQ and
  GPTQ (Frantar et al. 2022), without an inverse.

  Args:
    weight: the weight.
    factor: R, with each row divided by its element on the diagonal.
    scale: of each output.
    low: least code.
    high: greatest code.
  """
  depth, size = len(weight), min(BLOCK, len(weight))
  blocks = -(-depth // size)
  padding = blocks * size - depth
  # Padding is put in front, where rows are rounded last and change no others.
  weight = jnp.pad(weight, ((padding, 0), (0, 0)))
  factor = jnp.pad(factor, ((padding, 0), (padding, 0)))

  def round_block(index, carry):
    left, codes = carry
    start = (blocks - 1 - index) * size
    rows = jax.lax.dynamic_slice_in_dim(factor, start, size)
    own = jax.lax.dynamic_slice_in_dim(rows, start, size, axis=1)
    exact = jax.lax.dynamic_slice_in_dim(weight, start, size)
    # The errors of rows that are not yet rounded are still zero.
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


def _codes_of_group(
  weight: Float[Array, 'D C'],
  square: Float[Array, 'D D'],
  scales: Float[Array, 'K 1 C'],
  lows: Float[Array, ' K'],
  highs: Float[Array, ' K'],
) -> Float[Array, 'K D C']:
  """Codes of one group: by nearest plane or rounding, the better by output.

  Args:
    weight: the weight of the group.
    square: second moments of its inputs.
    scales: of each output, at K widths.
    lows: least codes.
    highs: greatest codes.
  """
  diagonal = jnp.diag(square)
  mean = jnp.mean(diagonal)
  # If all inputs are zero, all codes are equally good, and any damping will do.
  damping = DAMPING * jnp.where(mean > 0, mean, 1.0)
  # Strong inputs come last, so they are rounded first, while the remaining rows
  # can still correct their errors.
  order = jnp.argsort(diagonal)
  damped = square + damping * jnp.eye(len(diagonal))
  factor = jnp.linalg.cholesky(damped[order][:, order], upper=True)
  factor = factor / jnp.diag(factor)[:, None]

  def one(scale, low, high):
    plain = jnp.clip(jnp.round(weight / scale), low, high)
    found = nearest_plane(weight[order], factor, scale, low, high)
    found = jnp.zeros_like(found).at[order].set(found)
    before, after = (
      _error(square, weight - codes * scale) for codes in (plain, found)
    )
    return jnp.where(after < before, found, plain)

  return jax.vmap(one)(scales, lows, highs)


@functools.partial(jax.jit, static_argnames=('at_once', 'steps'))
def codes_and_shifts(
  weight: Float[Array, 'G D O'],
  moments: Moments,
  scales: Float[Array, 'G K 1 O'],
  lows: Float[Array, ' K'],
  highs: Float[Array, ' K'],
  at_once: int,
  steps: tuple[str, ...],
) -> tuple[Int[Array, 'G K D O'], Float[Array, 'G K O']]:
  """Codes, int8, and shifts of one layer.

  Args:
    weight: its weight as matrices.
    moments: moments of its input.
    scales: of each output, at K widths.
    lows: least codes.
    highs: greatest codes.
    at_once: groups that are computed at once.
    steps: see `reconstruct.reconstruct`.
  """

  def one(inputs):
    weight, moments, scales = inputs
    mean = moments.total / moments.count
    square = moments.square / moments.count
    if 'bias' in steps:
      # A shift corrects the mean of the error, so only its variance counts.
      square = square - jnp.outer(mean, mean)
    if 'rounding' in steps:
      codes = _codes_of_group(weight, square, scales, lows, highs)
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
