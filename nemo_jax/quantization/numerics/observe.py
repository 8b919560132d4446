"""Histograms of the values of tensors, exact over any number of examples."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Float, Int, Num, Shaped, UInt

from nemo_jax.core.types import Array, ArrayLike, InputError

BINS = 2048
# Number of weights that are summed in float32 at once.
_BLOCK = 2**16


def count(
  values: Shaped[ArrayLike, '...'],
  low: Num[ArrayLike, ''] | float | np.floating,
  high: Num[ArrayLike, ''] | float | np.floating,
) -> UInt[Array, ' bins']:
  """Number of values in each of BINS equal bins of [low, high], uint32.

  Values beyond the ends count in the first or last bin. Exact for one call; the
  sum of several may not fit into 32 bits, see `total`.

  Args:
    values: any shape.
    low: lower end of the first bin.
    high: upper end of the last bin.

  Raises:
    InputError: there are 2^32 values or more.
  """
  if values.size >= 2**32:
    raise InputError(f'{values.size} values are too many to count at once')
  counts = jnp.zeros(BINS, jnp.uint32)
  return counts.at[_bins(values, low, high).ravel()].add(1)


def _bins(values: ArrayLike, low: Any, high: Any) -> Int[Array, '...']:
  """The bin of [low, high] that each value is in, int32."""
  width = jnp.where(high > low, high - low, 1)
  index = (values.astype(jnp.float32) - low) / width * BINS
  return jnp.clip(index.astype(jnp.int32), 0, BINS - 1)


def histogram(
  values: Shaped[ArrayLike, '...'],
  low: Num[ArrayLike, ''] | float | np.floating,
  high: Num[ArrayLike, ''] | float | np.floating,
  weights: Num[ArrayLike, '...'] | float | None = None,
) -> Float[ArrayLike, ' bins']:
  """Total weight of the values in each of BINS equal bins of [low, high].

  Floats, so that sums of many calls do not overflow: float64 without weights,
  which is exact; float32 with weights, and in traced functions.

  Args:
    values: any shape.
    low: lower end of the first bin.
    high: upper end of the last bin.
    weights: weight of each value, broadcasts against the values; 1 if absent.
  """
  if weights is None:
    counts = count(values, low, high)
    if isinstance(counts, Tracer):
      return counts.astype(jnp.float32)
    return np.asarray(counts, np.float64)
  index = _bins(values, low, high)
  weights = jnp.broadcast_to(jnp.asarray(weights, jnp.float32), index.shape)
  size = max(min(index.size, _BLOCK), 1)
  blocks = [
    jnp.pad(x.ravel(), (0, -index.size % size)).reshape(-1, size)
    for x in (index, weights)
  ]

  # In one long sum, small weights would vanish beside a large total.
  def add(total, block):
    index, weights = block
    part = jnp.zeros(BINS, jnp.float32).at[index].add(weights)
    # Without the barrier XLA adds the weights to the total one by one.
    return total + jax.lax.optimization_barrier(part), None

  return jax.lax.scan(add, jnp.zeros(BINS, jnp.float32), blocks)[0]


def total(
  counts: Sequence[Num[ArrayLike, ' bins']] | Num[ArrayLike, 'parts bins'],
) -> Num[ArrayLike, ' bins']:
  """The sum of histograms, scaled to fit int32; float32 if they are traced.

  The sum, of up to 2^53 values, is divided by the greatest common divisor of
  its bins, so that a range does not depend on how often a sample was seen. If
  that does not fit, it is scaled such that the share of the values below each
  end of a bin is right to 2^-31.

  Args:
    counts: from `count`, or from `histogram` without weights.
  """
  if any(isinstance(x, Tracer) for x in counts):
    return functools.reduce(jnp.add, [x.astype(jnp.float32) for x in counts])
  return fitted(np.sum([np.asarray(x, np.int64) for x in counts], axis=0))


def fitted(counts: Int[np.ndarray, '*s']) -> Int[np.ndarray, '*s']:
  """Integers of 64 bits scaled to fit int32; see `total`."""
  counts = counts // max(np.gcd.reduce(counts.ravel()), 1)
  below = np.cumsum(counts.ravel())
  # Cumulative sums are rounded, not counts, so that no error accumulates.
  most = np.iinfo(np.int32).max
  if below.size and below[-1] > most:
    below = np.round(below * (most / below[-1])).astype(np.int64)
    counts = np.diff(below, prepend=0).reshape(counts.shape)
  return counts.astype(np.int32)
