"""Which bit-widths there are: defined here and nowhere else.

A quantizer has from 2 to 16 bits; more than 16 switch it off and leave its
tensor in float.
"""

import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from nemo_jax.core.types import Array, InputError

MIN_BITS = 2
# Beyond it a quantizer is the identity: float32 holds 24 bits, and ranges are
# calibrated for these widths.
MAX_BITS = 16
WIDTHS = tuple(range(MIN_BITS, MAX_BITS + 1))
# More bits than any quantizer has: the tensor stays in float.
SWITCHED_OFF = MAX_BITS + 1
# Of a float tensor, in costs.
FLOAT_BITS = 32
# Codes of so many bits, less their zero point, are exact in bfloat16, and fit
# the matrix units of accelerators.
NARROW_BITS = 8
# Widths with codes that are chosen by reconstruction; wider ones are rounded to
# nearest when they are needed.
CODED = tuple(range(MIN_BITS, NARROW_BITS + 1))
# What a search chooses from, unless it is told otherwise.
DEFAULT = (2, 3, 4, 5, 6, 7, 8)


def check_bits(bits: Array, count: int) -> Array:
  """int32[N]: the bits of a configuration.

  More than 16 bits leave a tensor in float.

  Raises:
    InputError: they are not whole numbers, not one a quantizer, or, where they
      are known while tracing, fewer than 2.
  """
  if not isinstance(bits, jax.core.Tracer):
    bits = np.asarray(bits)
  if not jnp.issubdtype(bits.dtype, jnp.integer):
    raise InputError(f'bits are of type {bits.dtype}; give whole numbers')
  if bits.shape != (count,):
    raise InputError(
      f'bits has shape {bits.shape}; there are {count} quantizers'
    )
  if isinstance(bits, jax.core.Tracer):
    return bits.astype(jnp.int32)
  if np.any(bits < MIN_BITS):
    place = int(np.argmax(bits < MIN_BITS))
    raise InputError(
      f'quantizer {place} has {bits[place]} bits; they go from {MIN_BITS}, and '
      f'over {MAX_BITS} leave a tensor in float'
    )
  # One more than any width stands for all wider ones.
  return jnp.asarray(np.minimum(bits, MAX_BITS + 1), jnp.int32)


def check_choices(bit_widths: Sequence[int]) -> tuple[int, ...]:
  """The bit-widths that a search chooses from.

  Raises:
    InputError: they are not two or more of WIDTHS, ascending.
  """
  widths = tuple(bit_widths)
  if widths != tuple(sorted(set(WIDTHS) & set(widths))) or len(widths) < 2:
    raise InputError(
      f'bit-widths are {list(widths)}; give two or more whole numbers, '
      f'ascending, from {MIN_BITS} to {MAX_BITS}'
    )
  return widths


def float_bits(count: int) -> np.ndarray:
  """int32[N]: bits that leave every tensor in float."""
  return np.full(count, SWITCHED_OFF, np.int32)


def from_word(word: str, is_weight: Sequence[bool]) -> np.ndarray:
  """int32[N]: the configuration that a word stands for.

  Args:
    word: `float`, a number of bits for all tensors, or such as `w4a8` for
      weights and activations.
    is_weight: of each quantizer.

  Raises:
    InputError: the word is none of these.
  """
  if word == 'float':
    return float_bits(len(is_weight))
  match = re.fullmatch('([0-9]{1,2})|w([0-9]{1,2})a([0-9]{1,2})', word)
  pair = [int(x) for x in match.groups() if x] if match else []
  if not pair or not all(x in WIDTHS for x in pair):
    raise InputError(
      f'{word!r} is no configuration; the choices are float, numbers from '
      f'{MIN_BITS} to {MAX_BITS}, and such as w4a8'
    )
  return np.where(is_weight, pair[0], pair[-1]).astype(np.int32)
