"""The bit-widths that a quantizer can have; defined here and nowhere else.

A quantizer has from 2 to 16 bits. More than 16 bits switch it off: its tensor
then stays in floating point.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Int

from nemo_jax.core.types import Array, InputError

MIN_BITS = 2
# With more bits a quantizer is the identity: float32 holds 24 bits, and ranges
# are calibrated for no more than these widths.
MAX_BITS = 16
WIDTHS = tuple(range(MIN_BITS, MAX_BITS + 1))
# One bit more than any quantizer has: the tensor stays in float.
SWITCHED_OFF = MAX_BITS + 1
# Bits of a value in a float tensor, as costs count them.
FLOAT_BITS = 32
# Codes of at most so many bits, minus their zero point, are exact in bfloat16,
# so the matrix units of accelerators can multiply them.
NARROW_BITS = 8
# Widths whose codes reconstruction chooses and a bank stores. At wider ones,
# weights are rounded to nearest whenever the network is encoded.
CODED = tuple(range(MIN_BITS, NARROW_BITS + 1))
# Widths that a search chooses from by default.
DEFAULT = (2, 3, 4, 5, 6, 7, 8)


def check_bits(bits: Any, count: int) -> Int[Array, ' N']:
  """Bits of a configuration, checked, as int32.

  Args:
    bits: integers [N], an array or a sequence; more than 16 bits leave a tensor
      in float, and are returned as 17.
    count: N, the number of quantizers.

  Raises:
    InputError: `bits` are not integers, or are not one for each quantizer; or
      one of them is below 2, which is checked unless `bits` are traced.
  """
  if not isinstance(bits, Tracer):
    bits = np.asarray(bits)
  if not jnp.issubdtype(bits.dtype, jnp.integer):
    raise InputError(f'bits are of type {bits.dtype}; give whole numbers')
  if bits.shape != (count,):
    raise InputError(
      f'bits has shape {bits.shape}; there are {count} quantizers'
    )
  if isinstance(bits, Tracer):
    return bits.astype(jnp.int32)
  if np.any(bits < MIN_BITS):
    place = int(np.argmax(bits < MIN_BITS))
    raise InputError(
      f'quantizer {place} has {bits[place]} bits; they go from {MIN_BITS}, and '
      f'over {MAX_BITS} leave a tensor in float'
    )
  # SWITCHED_OFF stands for everything wider.
  return jnp.asarray(np.minimum(bits, MAX_BITS + 1), jnp.int32)


def check_choices(bit_widths: Iterable[Any]) -> tuple[Any, ...]:
  """The bit-widths that a search chooses from, checked, as a tuple.

  Raises:
    InputError: they are not two or more of WIDTHS in ascending order.
  """
  widths = tuple(bit_widths)
  if widths != tuple(sorted(set(WIDTHS) & set(widths))) or len(widths) < 2:
    raise InputError(
      f'bit-widths are {list(widths)}; give two or more whole numbers, '
      f'ascending, from {MIN_BITS} to {MAX_BITS}'
    )
  return widths


def float_bits(count: int) -> Int[np.ndarray, ' N']:
  """The configuration, int32, that leaves all `count` tensors in float."""
  return np.full(count, SWITCHED_OFF, np.int32)


def from_word(word: str, is_weight: Sequence[bool]) -> Int[np.ndarray, ' N']:
  """The configuration, int32, that a word such as `w4a8` stands for.

  Args:
    word: `float`; a number of bits for all tensors; or, as in `w4a8`, one for
      all weights and one for all activations.
    is_weight: whether each of the N quantizers is that of a weight.

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
