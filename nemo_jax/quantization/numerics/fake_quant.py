"""Uniform affine fake quantization, with the bit-width as traced data."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from nemo_jax.core.types import Array, ArrayLike
from nemo_jax.quantization.numerics.widths import MAX_BITS, MIN_BITS

# Floats of any shape.
Floats = Float[ArrayLike, '...'] | float | np.floating


class Grid(NamedTuple):
  """The values that a quantizer can represent at one bit-width.

  Codes have their zero point z subtracted: they are the integers from `low`,
  -z, to `high`, 2^b - 1 - z, and a code times the scale is the value.
  """

  scale: Floats  # broadcasts against the tensor, as the next two
  low: Floats
  high: Floats
  # Whether the quantizer is switched off; None if it cannot be.
  identity: Bool[ArrayLike, ''] | bool | None


@jax.custom_jvp
def round_ste(x: Float[Array, '*s']) -> Float[Array, '*s']:
  """Nearest integers, ties to even, with the straight-through gradient.

  The gradient is that of the identity (Bengio et al. 2013).
  """
  return jnp.round(x)


@round_ste.defjvp
def _round_ste_jvp(
  primals: tuple[Any], tangents: tuple[Any]
) -> tuple[Any, Any]:
  """Rounded values, and the tangents unchanged."""
  return round_ste(*primals), tangents[0]


def largest_code(bits: Int[ArrayLike, '...'] | int) -> Float[Array, '...']:
  """The largest code of b bits, 2^b - 1, as float32; exact up to 16 bits."""
  one = jnp.ones((), jnp.int32)
  bits = jnp.clip(bits, MIN_BITS, MAX_BITS).astype(jnp.int32)
  return (jnp.left_shift(one, bits) - 1).astype(jnp.float32)


def grid(
  scale: Floats,
  zero_point: Floats,
  bits: Int[ArrayLike, ''] | int,
  max_bits: int | None = None,
) -> Grid:
  """The values that a quantizer can represent at some bits.

  Jacob et al. 2018, equation 1. Symmetric signed quantization is the case
  z = 2^(b-1) and unsigned quantization the case z = 0 of one formula.

  Args:
    scale: positive; broadcasts against the tensor.
    zero_point: an integer, so that 0.0 stays 0.0; broadcasts likewise.
    bits: may be traced; more than 16 make the quantizer the identity.
    max_bits: a promise that `bits` are never more, and so at most 16: the
      identity is then left out of the program.
  """
  low, high = -zero_point, largest_code(bits) - zero_point
  if max_bits is not None:
    return Grid(scale, low, high, None)
  identity = bits > MAX_BITS
  return Grid(jnp.where(identity, 1.0, scale), low, high, identity)


def encode(x: Float[ArrayLike, '...'], grid: Grid) -> Float[Array, '...']:
  """Codes of x minus the zero point: integers, in float32 or wider.

  Where the quantizer is switched off they are x itself. The gradient is zero
  where x is clipped, as in LSQ (Esser et al. 2020).
  """
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  # The scales are divided, not the values: a division for each value would take
  # longer than everything else here.
  steps = jnp.clip(x * (1 / grid.scale), grid.low, grid.high)
  codes = round_ste(steps)
  return codes if grid.identity is None else jnp.where(grid.identity, x, codes)


def fake_quant(
  x: Float[ArrayLike, '...'],
  scale: Floats,
  zero_point: Floats,
  bits: Int[ArrayLike, ''] | int,
) -> Float[Array, '...']:
  """The values x, quantized to b bits and dequantized, in the type of x.

  The gradient passes straight through the rounding and is zero where x is
  clipped; that of the scale is therefore the one of LSQ (Esser et al. 2020).

  Args:
    x: any shape.
    scale: positive; broadcasts against x.
    zero_point: an integer, so that 0.0 stays 0.0; broadcasts against x.
    bits: may be traced; more than 16 leave x as it is.
  """
  held = grid(scale, zero_point, bits)
  return (encode(x, held) * held.scale).astype(x.dtype)
