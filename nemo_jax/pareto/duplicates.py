"""Repeated rows, found by a hash."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Shaped

from nemo_jax.core import checks
from nemo_jax.core.types import Array
from nemo_jax.pareto import sorting


def _mix(words: Shaped[Array, '...']) -> Shaped[Array, '...']:
  """uint32 words, each bit spread over all others (murmur3's finalizer)."""
  words ^= words >> 16
  words *= jnp.uint32(0x85EBCA6B)
  words ^= words >> 13
  words *= jnp.uint32(0xC2B2AE35)
  return words ^ (words >> 16)


def duplicated(rows: Any, mask: Any = None) -> Bool[Array, ' n']:
  """Whether an earlier valid row is equal to this one.

  Rows are sorted by a hash of 48 bits or more and then compared with their
  neighbour, so that different rows are never called equal. Narrow types are
  faster, because one word of the hash holds several numbers.

  Args:
    rows: [n, k], of any type of numbers.
    mask: bool[n], valid rows; all if absent. Masked rows are never duplicates.

  Returns:
    bool[n].

  Raises:
    InputError: shapes or types do not fit.
  """
  rows = checks.array('rows', rows, 'nk', 'any')
  n = rows.shape[0]
  if mask is None:
    mask = jnp.ones(n, bool)
  mask = checks.array('mask', mask, 'n', 'bool', n=n)
  # -0.0 equals 0.0 but has other bits.
  words = jnp.where(rows == 0, jnp.zeros_like(rows), rows)
  if words.dtype == bool:
    words = words.astype(jnp.uint8)
  if words.dtype.itemsize < 4:
    spare = -words.shape[1] % (4 // words.dtype.itemsize)
    words = jnp.pad(words, ((0, 0), (0, spare)))
  # The low bits of round floats are all zero, and would be zero in any sum of
  # products of such words.
  words = _mix(words.view(jnp.uint32))
  # Bits of a hash that `order` can sort in one number, and as many hashes as
  # make 48 bits.
  bits = 32 - max(n - 1, 1).bit_length()
  size = (-(-48 // bits), words.shape[-1])
  odd = np.random.default_rng(0).integers(0, 2**31, size) * 2 + 1
  by_hash = jnp.arange(n)
  for factors in odd:
    hashes = jnp.sum(
      words * jnp.asarray(factors, jnp.uint32), axis=-1, dtype=jnp.uint32
    )
    # Masked rows get another hash, so that they do not come between two valid
    # rows that are equal.
    hashes = jnp.where(mask, hashes, ~hashes)[by_hash] >> (32 - bits)
    by_hash = by_hash[sorting.order(hashes, 2**bits)]
  ordered, valid = rows[by_hash], mask[by_hash]
  equal = jnp.all(ordered[1:] == ordered[:-1], axis=-1)
  equal &= valid[1:] & valid[:-1]
  return jnp.zeros(n, bool).at[by_hash[1:]].set(equal)
