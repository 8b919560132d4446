"""Uniform affine quantization with the bit-width as data."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nemo_jax.core.types import Array
from nemo_jax.quantization.numerics.widths import MAX_BITS, MIN_BITS


class Grid(NamedTuple):
  """What a quantizer can hold at one bit-width.

  Codes are kept without their zero point, as the whole numbers that multiply
  the scale: low to high, which are -z and 2^b - 1 - z.
  """

  scale: Array  # broadcasts against the tensor, as do the others
  low: Array
  high: Array
  identity: Array | None  # bool[]: anything goes; None where nothing does


@jax.custom_jvp
def round_ste(x: Array) -> Array:
  """Nearest integers (ties to even); the gradient passes straight through.

  Bengio et al. 2013.
  """
  return jnp.round(x)


@round_ste.defjvp
def _round_ste_jvp(primals, tangents):
  return round_ste(*primals), tangents[0]


def largest_code(bits: Array) -> Array:
  """float32: the code 2^b - 1, the last of b bits. Exact, b at most 16."""
  one = jnp.ones((), jnp.int32)
  bits = jnp.clip(bits, MIN_BITS, MAX_BITS).astype(jnp.int32)
  return (jnp.left_shift(one, bits) - 1).astype(jnp.float32)


def grid(
  scale: Array, zero_point: Array, bits: Array, max_bits: int | None = None
) -> Grid:
  """The grid of a quantizer.

  Symmetric signed quantization is the case z = 2^(b-1), unsigned z = 0, so
  one formula serves all; Jacob et al. 2018, equation 1.

  Args:
    scale: float32, positive.
    zero_point: float32, an integer, so that 0.0 stays 0.0.
    bits: int32[], traced or not. More than 16 makes it the identity.
    max_bits: bits are never more; no identity is prepared for.
  """
  low, high = -zero_point, largest_code(bits) - zero_point
  if max_bits is not None:
    return Grid(scale, low, high, None)
  identity = bits > MAX_BITS
  return Grid(jnp.where(identity, 1.0, scale), low, high, identity)


def encode(x: Array, grid: Grid) -> Array:
  """Codes of x less the zero point, whole numbers held in float32.

  Gradients stop where x is clipped, as in LSQ (Esser et al. 2020).
  """
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  # One division a quantizer: by a scale for each value, it would take longer
  # than all the rest.
  steps = jnp.clip(x * (1 / grid.scale), grid.low, grid.high)
  codes = round_ste(steps)
  return codes if grid.identity is None else jnp.where(grid.identity, x, codes)


def fake_quant(x: Array, scale: Array, zero_point: Array, bits: Array) -> Array:
  """What b bits can hold of x: quantized and dequantized, in x's dtype.

  Gradients go straight through the rounding and stop where x is clipped;
  those of scale are the ones of LSQ (Esser et al. 2020) by construction.

  Args:
    x: any shape.
    scale: broadcasts against x; positive.
    zero_point: broadcasts against x; an integer, so that 0.0 stays 0.0.
    bits: int32[], traced or not. More than 16 leaves x as it is.
  """
  held = grid(scale, zero_point, bits)
  return (encode(x, held) * held.scale).astype(x.dtype)
