"""Ranges of quantizers against NumPy, and what they promise of the error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_jax.quantization.numerics import fake_quant as fq
from nemo_jax.quantization.numerics import observe, ranges
from nemo_jax.quantization.numerics import widths as widths_lib
from tests.quantization.numerics.samples import (
  PERCENTILE,
  SHAPE,
  drawn,
  each_method,
  some,
  weights,
)

WIDTHS = np.asarray(widths_lib.WIDTHS)
# By how much a percentile that lies between two of the 32 ends that are tried
# may err less than either.
GRID = 0.35
each_scheme = pytest.mark.parametrize('scheme', ranges.SCHEMES)


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
  counts = observe.histogram(values, low, high)
  return ranges.activation_range(low, high, counts, method, percentile)


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
  counts = np.asarray(observe.histogram(jnp.asarray(values), low, high))
  edges = np.linspace(low, high, observe.BINS + 1)
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
  width = (values.max() - values.min()) / observe.BINS
  np.testing.assert_allclose(ends(table), expected, atol=1.1 * width)


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
