"""Ranges of quantizers against NumPy, and what they promise of the error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import nemo_jax
from nemo_jax.quantization.numerics import fake_quant as fq
from nemo_jax.quantization.numerics import ranges
from nemo_jax.quantization.numerics import widths as widths_lib

WIDTHS = np.asarray(widths_lib.WIDTHS)
SHAPE = (40, 3)  # of most weights below, so that programs are compiled once
PERCENTILE = 95.0
# By how much a percentile that lies between two of the 32 ends that are tried
# may err less than either.
GRID = 0.35
each_method = pytest.mark.parametrize('method', ranges.METHODS)
each_scheme = pytest.mark.parametrize('scheme', ranges.SCHEMES)
weights = hnp.arrays(np.float32, SHAPE, elements=st.floats(-10, 10, width=32))
some = settings(max_examples=25, deadline=None)


@jax.jit
def at_every_width(of, table):
  """(of what a quantizer holds float32, codes), a row for each of WIDTHS."""

  def one(bits):
    scale, zero_point = table.at(bits)
    held = fq.fake_quant(of, scale, zero_point, bits)
    return held, fq.encode(of, fq.grid(scale, zero_point, bits)) + zero_point

  return jax.vmap(one)(WIDTHS)


def held_and_codes(of, table):
  return [np.asarray(x) for x in at_every_width(jnp.asarray(of), table)]


def squared_error(values, table, axes=None, counts=1.0):
  held = held_and_codes(values, table)[0].astype(np.float64)
  squares = counts * (held - values) ** 2
  axes = range(values.ndim) if axes is None else axes
  return squares.sum(tuple(a + 1 for a in axes))


def weight_range(weight, method, scheme='symmetric', axes=(1,)):
  weight = jnp.asarray(weight, jnp.float32)
  return ranges.weight_range(weight, axes, method, scheme, PERCENTILE)


def activation_range(values, method, percentile=PERCENTILE):
  values = jnp.asarray(values, jnp.float32)
  low, high = values.min(), values.max()
  counts = ranges.histogram(values, low, high)
  return ranges.activation_range(low, high, counts, method, percentile)


def drawn(name, shape=SHAPE):
  """Values with tails of several weights, and none at all."""
  rng = np.random.default_rng(0)
  draw = {
    'gaussian': rng.normal,
    'laplace': rng.laplace,
    'uniform': lambda size: rng.uniform(-1, 1, size),
    'heavy': lambda size: rng.standard_t(2, size),
    'positive': lambda size: np.abs(rng.normal(size=size)),
    'skewed': lambda size: rng.exponential(size=size) - 0.2,
  }[name]
  return draw(size=shape).astype(np.float32)


NAMES = ('gaussian', 'laplace', 'uniform', 'heavy', 'positive', 'skewed')
each_distribution = pytest.mark.parametrize('name', NAMES)


def assert_usable(table):
  """A finite positive scale, and 0.0 on a code, at every width."""
  scale, zero_point = np.asarray(table.scale), np.asarray(table.zero_point)
  assert scale.shape == zero_point.shape
  assert len(scale) == len(WIDTHS)
  assert np.isfinite(scale).all()
  assert (scale > 0).all()
  last = (2.0**WIDTHS - 1).reshape(-1, *[1] * (scale.ndim - 1))
  assert (zero_point == np.rint(zero_point)).all()
  assert (zero_point >= 0).all()
  assert (zero_point <= last).all()


# The error of what is chosen.


@some
@given(weights)
@pytest.mark.parametrize(('scheme', 'axes'), [
  ('symmetric', (0,)),
  ('asymmetric', (0, 1)),
])  # fmt: skip
def test_least_squares_never_errs_more_than_min_max(scheme, axes, weight):
  least, full = (
    squared_error(weight, weight_range(weight, method, scheme), axes)
    for method in ('least_squares', 'min_max')
  )
  # The last bit of a scale may differ, and with it every value that is held.
  rounding = 2e-6 * np.linalg.norm(weight)
  assert (np.sqrt(least) <= (1 + 1e-5) * np.sqrt(full) + rounding).all()


@each_scheme
@each_distribution
def test_least_squares_errs_no_more_than_a_percentile(scheme, name):
  weight = drawn(name)
  axes = (0,) if scheme == 'symmetric' else (0, 1)
  least, percentile = (
    squared_error(weight, weight_range(weight, method, scheme), axes)
    for method in ('least_squares', 'percentile')
  )
  assert (least <= (1 + GRID) * percentile).all()


@each_distribution
def test_least_squares_of_an_activation_errs_least(name):
  values = drawn(name, (4000,))
  low, high = values.min(), values.max()
  counts = np.asarray(ranges.histogram(jnp.asarray(values), low, high))
  edges = np.linspace(low, high, ranges.BINS + 1)
  centers = ((edges[1:] + edges[:-1]) / 2).astype(np.float32)
  tables = {m: activation_range(values, m) for m in ranges.METHODS}
  binned = {
    m: squared_error(centers, table, counts=counts)
    for m, table in tables.items()
  }
  least = binned['least_squares']
  assert (least <= 1.001 * binned['min_max']).all()
  assert (least <= (1 + GRID) * binned['percentile']).all()
  # What holds of the histogram holds of the values, to within a bin; 8 bits
  # are eight bins a code.
  exact = {m: squared_error(values, table)[:7] for m, table in tables.items()}
  assert (exact['least_squares'] <= 1.05 * exact['min_max']).all()
  assert (exact['least_squares'] <= (1 + GRID) * exact['percentile']).all()


def test_least_squares_clips_a_heavy_tail_where_bits_are_few():
  weight = drawn('laplace', (2000, 1))
  least = squared_error(weight, weight_range(weight, 'least_squares'))
  full = squared_error(weight, weight_range(weight, 'min_max'))
  assert least[0] < full[0] / 2


@each_scheme
@each_distribution
def test_more_bits_never_err_more(scheme, name):
  weight = drawn(name)
  for method in ('least_squares', 'min_max'):
    error = squared_error(weight, weight_range(weight, method, scheme))
    assert (error[1:] <= 1.01 * error[:-1]).all()
  error = squared_error(weight, activation_range(weight, 'least_squares'))
  assert (error[1:] <= 1.05 * error[:-1]).all()


# The ends of the range.


@some
@given(weights)
def test_min_max_puts_the_largest_of_each_channel_on_an_end(weight):
  table = weight_range(weight, 'min_max')
  assert_usable(table)
  _, codes = held_and_codes(weight, table)
  for channel in np.flatnonzero(np.abs(weight).max(0) > 1e-30):
    largest = np.abs(weight[:, channel]).argmax()
    sign = np.sign(weight[largest, channel])
    # Signed codes go to 2^(b-1) - 1 from 0, and as far below.
    reach = 2 ** (WIDTHS - 1) + sign * (2 ** (WIDTHS - 1) - 1)
    np.testing.assert_array_equal(codes[:, largest, channel], reach)


@each_distribution
def test_affine_min_max_puts_least_on_the_first_and_greatest_on_the_last(name):
  weight = drawn(name)
  for table in (
    weight_range(weight, 'min_max', 'asymmetric'),
    activation_range(weight, 'min_max'),
  ):
    held, codes = held_and_codes(weight, table)
    np.testing.assert_array_equal(codes.max((1, 2)), 2**WIDTHS - 1)
    if weight.min() < 0:
      np.testing.assert_array_equal(codes.min((1, 2)), np.zeros(len(WIDTHS)))
    half = np.asarray(table.scale).reshape(-1, 1, 1) / 2
    assert (np.abs(held - weight) <= half * 1.01).all()


@some
@given(weights, st.sampled_from([-1, 0, 1]), st.sampled_from(ranges.METHODS))
def test_every_range_contains_zero(weight, sign, method):
  values = sign * np.abs(weight) if sign else weight
  for table in (
    weight_range(values, method, 'symmetric'),
    weight_range(values, method, 'asymmetric'),
    activation_range(values, method),
  ):
    assert_usable(table)
    held, _ = held_and_codes(np.zeros(SHAPE, np.float32), table)
    assert (held == 0).all()


@each_method
def test_data_without_negatives_are_unsigned_at_every_width(method):
  values = drawn('positive')
  for table in (
    weight_range(values, method, 'asymmetric'),
    activation_range(values, method),
    activation_range(np.maximum(drawn('gaussian'), 0), method),
  ):
    np.testing.assert_array_equal(table.zero_point, np.zeros(len(WIDTHS)))


@each_method
def test_data_without_positives_use_every_code(method):
  table = activation_range(-drawn('positive'), method)
  np.testing.assert_array_equal(table.zero_point, 2**WIDTHS - 1)


@each_method
@each_scheme
@pytest.mark.parametrize('value', [0.0, 3.0, -3.0, 1e-30, 1e-37, 1e-44, 1e15])
def test_a_constant_tensor_has_a_usable_range(method, scheme, value):
  weight = np.full(SHAPE, value, np.float32)
  for table in (
    weight_range(weight, method, scheme),
    activation_range(weight, method),
  ):
    assert_usable(table)
    held, _ = held_and_codes(weight, table)
    np.testing.assert_allclose(held, [weight] * len(WIDTHS), 1e-5, 2e-37)


@each_method
@each_scheme
@pytest.mark.parametrize('value', [0.0, -0.7])
def test_a_single_element_has_a_usable_range(method, scheme, value):
  for table in (
    weight_range([[value]], method, scheme),
    activation_range([value], method),
  ):
    assert_usable(table)
    held, _ = held_and_codes(np.full((1, 1), value, np.float32), table)
    np.testing.assert_allclose(held.ravel(), value, rtol=1e-6)


# Percentiles.


def ends(table, bits=16):
  """The least and greatest value that a range holds."""
  scale, zero_point = (np.asarray(x, np.float64) for x in table.at(bits))
  return -zero_point * scale, (2**bits - 1 - zero_point) * scale


@pytest.mark.parametrize('percentile', [60, 95, 99, 100])
def test_percentiles_of_weights_are_those_of_numpy(percentile):
  weight = drawn('skewed') - 0.5
  tails = [50 - percentile / 2, 50 + percentile / 2]
  find = lambda scheme: ranges.weight_range(
    jnp.asarray(weight), (1,), 'percentile', scheme, percentile
  )
  low, high = np.percentile(weight, tails)
  steps = (high - low) / 65535
  np.testing.assert_allclose(ends(find('asymmetric')), [low, high], atol=steps)
  bound = np.abs(np.percentile(weight, tails, axis=0)).max(0)
  scale = np.asarray(find('symmetric').at(16)[0])
  np.testing.assert_allclose(scale[0] * 32767, bound, rtol=1e-5)


@pytest.mark.parametrize('percentile', [60, 95, 99, 99.9, 100])
def test_percentiles_of_activations_are_those_of_numpy_to_a_bin(percentile):
  values = drawn('skewed', (20003,)) - 0.5
  tails = [50 - percentile / 2, 50 + percentile / 2]
  expected = np.percentile(values, tails, method='inverted_cdf')
  table = activation_range(values, 'percentile', percentile)
  width = (values.max() - values.min()) / ranges.BINS
  np.testing.assert_allclose(ends(table), expected, atol=1.1 * width)


# Histograms.


def test_the_histogram_is_that_of_numpy():
  rng = np.random.default_rng(0)
  # Exact in float32, and so are the edges: no value is near a boundary.
  values = rng.integers(-4096, 4097, (50, 60)) / np.float32(4096)
  values = np.append(values.ravel(), [-1, 1, 1]).astype(np.float32)
  counts = ranges.histogram(jnp.asarray(values), -1.0, 1.0)
  expected, _ = np.histogram(values, ranges.BINS, (-1, 1))
  np.testing.assert_array_equal(counts, expected)


def test_the_histogram_of_any_values_is_that_of_numpy_but_for_rounding():
  values = drawn('heavy', (20000,))
  low, high = values.min(), values.max()
  counts = np.asarray(ranges.histogram(jnp.asarray(values), low, high))
  expected, _ = np.histogram(values, ranges.BINS, (low, high))
  assert counts.sum() == values.size
  assert np.abs(np.cumsum(counts) - np.cumsum(expected)).max() <= 2


@some
@given(weights)
def test_histograms_of_chunks_add_up(values):
  low, high = values.min(), values.max()
  count = lambda x: np.asarray(ranges.histogram(jnp.asarray(x), low, high))
  whole = count(values)
  assert whole.sum() == values.size
  np.testing.assert_array_equal(whole, count(values[:9]) + count(values[9:]))


def repeated(counts, times, method):
  low, high = np.float32(-3), np.float32(40)
  return ranges.activation_range(low, high, counts * times, method)


@each_method
@some
@given(
  hnp.arrays(np.int64, ranges.BINS, elements=st.integers(0, 40)),
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
  shares = np.round(1e9 * np.exp(-np.linspace(0, 12, ranges.BINS)))
  few = repeated(shares, 1, method)
  many = repeated(shares * 40 + rng.integers(0, 2, ranges.BINS), 1, method)
  np.testing.assert_allclose(many.scale, few.scale, rtol=1e-3)


def test_sums_of_histograms_do_not_wrap():
  """3 x 2^31 values: 48 chunks of 2^27, of which half are one number."""
  part = jnp.concatenate([jnp.zeros(2**12), jnp.linspace(0, 1, 2**12)])
  low, high = np.float32(0), np.float32(1)
  count = ranges.histogram(part, low, high) * 2**14
  total = sum([count] * 48)
  assert total.sum() == 48 * 2**27
  traced = jax.jit(ranges.histogram)(part, low, high) * 2**14
  np.testing.assert_allclose(sum([traced] * 48), total, rtol=1e-5)


def test_a_bin_takes_more_values_than_float32_counts():
  """2^24 + 2^20: beyond 2^24 a float32 no longer grows by ones."""
  values = jnp.zeros(2**24 + 2**20, jnp.bfloat16)
  low, high = np.float32(0), np.float32(1)
  for one in (ranges.histogram, jax.jit(ranges.histogram)):
    assert one(values, low, high)[0] == len(values)
  weighed = jax.jit(ranges.histogram)(values, low, high, 0.1)
  np.testing.assert_allclose(weighed[0], 0.1 * len(values), rtol=1e-3)


def test_the_total_of_chunks_fits_32_bits_and_keeps_shares():
  rng = np.random.default_rng(0)
  parts = rng.integers(0, 2**32, (64, ranges.BINS)).astype(np.uint32)
  total = ranges.total(parts)
  assert total.dtype == np.int32
  assert total.min() >= 0
  exact = np.cumsum(parts.astype(np.float64).sum(axis=0))
  found = np.cumsum(total.astype(np.float64))
  np.testing.assert_allclose(
    found / found[-1], exact / exact[-1], rtol=0, atol=2.0**-30
  )
  few = [np.arange(5, dtype=np.uint32), np.ones(5, np.uint32)]
  np.testing.assert_array_equal(ranges.total(few), [1, 2, 3, 4, 5])
  traced = jax.jit(lambda *x: ranges.total(x))(*few)
  np.testing.assert_array_equal(traced, [1, 2, 3, 4, 5])


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


# Shapes and schemes.


@each_method
def test_a_symmetric_weight_has_a_scale_a_channel(method):
  weight = drawn('gaussian', (4, 5, 6)) * np.arange(1, 7)
  table = weight_range(weight, method, axes=(0, 2))
  assert table.scale.shape == (len(WIDTHS), 4, 1, 6)
  middle = np.broadcast_to(
    2.0 ** (WIDTHS - 1).reshape(-1, 1, 1, 1), table.scale.shape
  )
  np.testing.assert_array_equal(table.zero_point, middle)
  for i, j in np.ndindex(4, 6):
    alone = weight_range(weight[i, :, j], method, axes=())
    np.testing.assert_allclose(table.scale[:, i, 0, j], alone.scale, rtol=1e-4)


@each_method
def test_the_asymmetric_scheme_has_one_scale_a_tensor(method):
  weight = drawn('gaussian')
  table = weight_range(weight, method, 'asymmetric')
  assert table.scale[0].size == table.zero_point[0].size == 1


@each_scheme
def test_a_lone_scale_fits_the_weight_in_any_rank(scheme):
  weight = drawn('gaussian')
  table = weight_range(weight, 'min_max', scheme, axes=())
  held, _ = held_and_codes(weight, table)
  flat, _ = held_and_codes(weight.ravel(), table)
  np.testing.assert_array_equal(held.reshape(flat.shape), flat)


def test_bits_beyond_the_table_take_its_ends():
  table = weight_range(drawn('gaussian'), 'min_max')
  for bits, row in ((1, 0), (2, 0), (9, 7), (16, 14), (32, 14)):
    scale, zero_point = table.at(bits)
    np.testing.assert_array_equal(scale, table.scale[row])
    np.testing.assert_array_equal(zero_point, table.zero_point[row])


def test_a_narrow_float_is_calibrated_in_float32():
  weight = jnp.asarray(drawn('gaussian'), jnp.bfloat16)
  table = ranges.weight_range(weight, (1,), 'min_max')
  assert table.scale.dtype == table.zero_point.dtype == jnp.float32
