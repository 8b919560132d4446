"""Uniform affine quantization with the bit-width as data."""

import jax
import jax.numpy as jnp

from nemo_jax.base import Array

# Beyond this a quantizer is the identity: float32 holds 24 bits, and ranges
# are calibrated for these widths.
MIN_BITS = 2
MAX_BITS = 16


def round_ste(x: Array) -> Array:
  """Nearest integers (ties to even); the gradient passes straight through.

  Bengio et al. 2013.
  """
  return x + jax.lax.stop_gradient(jnp.round(x) - x)


def largest_code(bits: Array) -> Array:
  """float32: the code 2^b - 1, the last of b bits. Exact, b at most 16."""
  one = jnp.ones((), jnp.int32)
  bits = jnp.clip(bits, MIN_BITS, MAX_BITS).astype(jnp.int32)
  return (jnp.left_shift(one, bits) - 1).astype(jnp.float32)


def encode(x: Array, scale: Array, zero_point: Array, bits: Array) -> Array:
  """Integer codes of x, held in float32: clip(round(x / s) + z, 0, 2^b - 1).

  Symmetric signed quantization is the case z = 2^(b-1), unsigned z = 0, so
  one formula serves all; Jacob et al. 2018, equation 1.
  """
  last = largest_code(bits)
  code = x.astype(jnp.float32) / scale
  # Clipped before it is rounded, as in LSQ, which sets where gradients stop.
  return round_ste(jnp.clip(code, -zero_point, last - zero_point)) + zero_point


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
  code = encode(x, scale, zero_point, bits)
  quantized = ((code - zero_point) * scale).astype(x.dtype)
  return jnp.where(bits > MAX_BITS, x, quantized)
