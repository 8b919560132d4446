"""Histograms of what quantizers see, exact over any number of images."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from nemo_jax.core.types import Array, InputError

BINS = 2048
# Weights that are added up in float32 one after the other.
_BLOCK = 2**16


def count(values: Array, low: Array, high: Array) -> Array:
  """uint32[BINS]: how many values lie in each equal part of [low, high].

  Exact for one call; the sum of several may not fit, see `total`.

  Args:
    values: any shape.
    low: of the first part.
    high: of the last.

  Raises:
    InputError: there are 2^32 values or more.
  """
  if values.size >= 2**32:
    raise InputError(f'{values.size} values are too many to count at once')
  counts = jnp.zeros(BINS, jnp.uint32)
  return counts.at[_bins(values, low, high).ravel()].add(1)


def _bins(values: Array, low: Array, high: Array) -> Array:
  """int32[...]: in which equal part of [low, high] each value lies."""
  width = jnp.where(high > low, high - low, 1)
  index = (values.astype(jnp.float32) - low) / width * BINS
  return jnp.clip(index.astype(jnp.int32), 0, BINS - 1)


def histogram(
  values: Array, low: Array, high: Array, weights: Array | None = None
) -> Array:
  """[BINS]: how much lies in each equal part of [low, high].

  Floats, so that sums of many calls never wrap; those of values without
  weights are of 64 bits, and exact, outside of traced functions.

  Args:
    values: any shape.
    low: of the first part.
    high: of the last.
    weights: broadcasts against the values: what each counts; 1 if absent.
  """
  if weights is None:
    counts = count(values, low, high)
    if isinstance(counts, jax.core.Tracer):
      return counts.astype(jnp.float32)
    return np.asarray(counts, np.float64)
  index = _bins(values, low, high)
  weights = jnp.broadcast_to(jnp.asarray(weights, jnp.float32), index.shape)
  size = max(min(index.size, _BLOCK), 1)
  blocks = [
    jnp.pad(x.ravel(), (0, -index.size % size)).reshape(-1, size)
    for x in (index, weights)
  ]

  # A sum stops growing where what is added is too small beside it.
  def add(total, block):
    index, weights = block
    part = jnp.zeros(BINS, jnp.float32).at[index].add(weights)
    # XLA would add to the total one by one.
    return total + jax.lax.optimization_barrier(part), None

  return jax.lax.scan(add, jnp.zeros(BINS, jnp.float32), blocks)[0]


def total(counts: Sequence[Array]) -> Array:
  """The sum of counts [BINS], in shares that fit 32 bits.

  int32, of up to 2^53 values. They are divided by what all have in common, so
  that a range does not depend on how often a sample was seen; where that is
  not enough, so that the share of what lies below each end of a bin is right to
  2^-31. While they are traced, float32.

  Args:
    counts: from `count`, or what `histogram` made without weights.
  """
  if any(isinstance(x, jax.core.Tracer) for x in counts):
    return functools.reduce(jnp.add, [x.astype(jnp.float32) for x in counts])
  return fitted(np.sum([np.asarray(x, np.int64) for x in counts], axis=0))


def fitted(counts: np.ndarray) -> np.ndarray:
  """int32[...], in proportion to int64[...]."""
  counts = counts // max(np.gcd.reduce(counts.ravel()), 1)
  below = np.cumsum(counts.ravel())
  # Not the counts but their sums are rounded, lest the errors add up.
  most = np.iinfo(np.int32).max
  if below.size and below[-1] > most:
    below = np.round(below * (most / below[-1])).astype(np.int64)
    counts = np.diff(below, prepend=0).reshape(counts.shape)
  return counts.astype(np.int32)
