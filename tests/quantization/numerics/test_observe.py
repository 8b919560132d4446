"""Histograms against NumPy, and ranges that depend on their shares alone."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import nemo_jax
from nemo_jax.quantization.numerics import observe, ranges
from tests.quantization.numerics.samples import (
  PERCENTILE,
  drawn,
  each_method,
  some,
  weights,
)

# Histograms.


def test_the_histogram_is_that_of_numpy():
  rng = np.random.default_rng(0)
  # Exact in float32, and so are the edges: no value is near a boundary.
  values = rng.integers(-4096, 4097, (50, 60)) / np.float32(4096)
  values = np.append(values.ravel(), [-1, 1, 1]).astype(np.float32)
  counts = observe.histogram(jnp.asarray(values), -1.0, 1.0)
  expected, _ = np.histogram(values, observe.BINS, (-1, 1))
  np.testing.assert_array_equal(counts, expected)


def test_the_histogram_of_any_values_is_that_of_numpy_but_for_rounding():
  values = drawn('heavy', (20000,))
  low, high = values.min(), values.max()
  counts = np.asarray(observe.histogram(jnp.asarray(values), low, high))
  expected, _ = np.histogram(values, observe.BINS, (low, high))
  assert counts.sum() == values.size
  assert np.abs(np.cumsum(counts) - np.cumsum(expected)).max() <= 2


@some
@given(weights)
def test_histograms_of_chunks_add_up(values):
  low, high = values.min(), values.max()
  count = lambda x: np.asarray(observe.histogram(jnp.asarray(x), low, high))
  whole = count(values)
  assert whole.sum() == values.size
  np.testing.assert_array_equal(whole, count(values[:9]) + count(values[9:]))


def test_sums_of_histograms_do_not_wrap():
  """3 x 2^31 values: 48 chunks of 2^27, of which half are one number."""
  part = jnp.concatenate([jnp.zeros(2**12), jnp.linspace(0, 1, 2**12)])
  low, high = np.float32(0), np.float32(1)
  count = observe.histogram(part, low, high) * 2**14
  total = sum([count] * 48)
  assert total.sum() == 48 * 2**27
  traced = jax.jit(observe.histogram)(part, low, high) * 2**14
  np.testing.assert_allclose(sum([traced] * 48), total, rtol=1e-5)


def test_a_bin_takes_more_values_than_float32_counts():
  """2^24 + 2^20: beyond 2^24 a float32 no longer grows by ones."""
  values = jnp.zeros(2**24 + 2**20, jnp.bfloat16)
  low, high = np.float32(0), np.float32(1)
  for one in (observe.histogram, jax.jit(observe.histogram)):
    assert one(values, low, high)[0] == len(values)
  weighed = jax.jit(observe.histogram)(values, low, high, 0.1)
  np.testing.assert_allclose(weighed[0], 0.1 * len(values), rtol=1e-3)


def test_the_total_of_chunks_fits_32_bits_and_keeps_shares():
  rng = np.random.default_rng(0)
  parts = rng.integers(0, 2**32, (64, observe.BINS)).astype(np.uint32)
  total = observe.total(parts)
  assert total.dtype == np.int32
  assert total.min() >= 0
  exact = np.cumsum(parts.astype(np.float64).sum(axis=0))
  found = np.cumsum(total.astype(np.float64))
  np.testing.assert_allclose(
    found / found[-1], exact / exact[-1], rtol=0, atol=2.0**-30
  )
  few = [np.arange(5, dtype=np.uint32), np.ones(5, np.uint32)]
  np.testing.assert_array_equal(observe.total(few), [1, 2, 3, 4, 5])
  traced = jax.jit(lambda *x: observe.total(x))(*few)
  np.testing.assert_array_equal(traced, [1, 2, 3, 4, 5])


# How often a sample is seen.


def repeated(counts, times, method):
  low, high = np.float32(-3), np.float32(40)
  return ranges.activation_range(low, high, counts * times, method)


@each_method
@some
@given(
  hnp.arrays(np.int64, observe.BINS, elements=st.integers(0, 40)),
  st.one_of(st.integers(2, 2**28), st.sampled_from([3, 48, 2**24, 10**9])),
)
def test_ranges_do_not_depend_on_how_often_a_sample_is_seen(
  method, counts, times
):
  counts[[0, -1]] = 1
  counts = counts.astype(np.float64)
  jax.tree.map(
    np.testing.assert_array_equal,
    repeated(counts, times, method),
    repeated(counts, 1, method),
  )


@each_method
def test_ranges_of_very_many_values_are_those_of_their_shares(method):
  """Counts beyond 2^33 that have nothing in common."""
  rng = np.random.default_rng(0)
  shares = np.round(1e9 * np.exp(-np.linspace(0, 12, observe.BINS)))
  few = repeated(shares, 1, method)
  many = repeated(shares * 40 + rng.integers(0, 2, observe.BINS), 1, method)
  np.testing.assert_allclose(many.scale, few.scale, rtol=1e-3)


@each_method
def test_quantizers_do_not_depend_on_how_often_images_are_seen(method):
  rng = np.random.default_rng(0)
  images = rng.standard_t(3, (24, 7)).astype(np.float32)
  weights = rng.normal(size=(7, 3)).astype(np.float32)
  apply = lambda w, x: x @ w
  quantize = lambda x: nemo_jax.quantize(
    apply, weights, x, calibration=method, percentile=PERCENTILE, chunk=8
  )
  jax.tree.map(
    np.testing.assert_array_equal,
    quantize(np.tile(images, (5, 1))).bank.ranges,
    quantize(images).bank.ranges,
  )
