"""The quantizer against integer arithmetic in NumPy and LSQ's gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nemo_jax.quantization.numerics import fake_quant as fq
from nemo_jax.quantization.numerics.widths import WIDTHS

ALL_BITS = WIDTHS
SIZE = 24
fake_quant = jax.jit(fq.fake_quant)


@jax.jit
def encode(x, scale, zero_point, bits):
  """The codes that are stored, with the zero point."""
  return fq.encode(x, fq.grid(scale, zero_point, bits)) + zero_point


@st.composite
def quantizers(draw):
  """(scale, zero point, bits) of a signed, unsigned or affine quantizer."""
  bits = draw(st.sampled_from(ALL_BITS))
  scale = draw(st.floats(2.0**-12, 2.0**12, width=32))
  kind = draw(st.sampled_from(['signed', 'unsigned', 'affine']))
  zero_point = {
    'signed': st.just(2 ** (bits - 1)),
    'unsigned': st.just(0),
    'affine': st.integers(0, 2**bits - 1),
  }[kind]
  return np.float32(scale), np.float32(draw(zero_point)), bits


def tensors(largest):
  bounds = st.floats(-largest, largest, width=32)
  return hnp.arrays(np.float32, SIZE, elements=bounds)


def integer_reference(x, scale, zero_point, bits):
  """(codes int64, what they stand for float64), in NumPy."""
  with np.errstate(over='ignore', under='ignore'):
    steps = np.rint(x * (1 / scale))
  steps = np.clip(steps, -(2.0**40), 2.0**40).astype(np.int64)
  codes = np.clip(steps + np.int64(zero_point), 0, 2**bits - 1)
  return codes, (codes - np.int64(zero_point)) * np.float64(scale)


def gaussian(seed=0, size=200):
  return np.random.default_rng(seed).normal(size=size).astype(np.float32)


@settings(max_examples=200, deadline=None)
@given(quantizers(), st.floats(0.25, 4), tensors(1.0))
def test_codes_and_values_are_those_of_integer_arithmetic(q, spread, x):
  scale, zero_point, bits = q
  # Over and beyond the range of the quantizer, at every width.
  x = (x * np.float32(spread * 2**bits) * scale).astype(np.float32)
  codes, values = integer_reference(x, *q)
  np.testing.assert_array_equal(encode(x, *q), codes)
  np.testing.assert_array_equal(fake_quant(x, *q), values.astype(np.float32))


@settings(max_examples=100, deadline=None)
@given(quantizers(), tensors(float(np.finfo(np.float32).max)))
def test_codes_of_any_finite_tensor_are_integers_within_range(q, x):
  codes = np.asarray(encode(x, *q))
  assert codes.dtype == np.float32
  assert (codes == np.rint(codes)).all()
  assert codes.min() >= 0
  assert codes.max() <= 2 ** q[2] - 1


@settings(max_examples=100, deadline=None)
@given(quantizers(), tensors(1.0e4))
def test_quantizing_twice_changes_nothing_more(q, x):
  once = fake_quant(x, *q)
  np.testing.assert_array_equal(fake_quant(once, *q), once)


@settings(max_examples=100, deadline=None)
@given(quantizers(), tensors(1.0e4))
def test_an_unclipped_value_moves_by_at_most_half_a_step(q, x):
  scale, zero_point, bits = q
  inside = np.clip(x, -zero_point * scale, (2.0**bits - 1 - zero_point) * scale)
  moved = np.abs(np.asarray(fake_quant(inside, *q)) - inside)
  assert (moved <= scale / 2 * (1 + 2.0**-6)).all()


@given(quantizers())
@settings(max_examples=100, deadline=None)
def test_zero_stays_zero(q):
  x = np.zeros(SIZE, np.float32)
  np.testing.assert_array_equal(fake_quant(x, *q), x)
  np.testing.assert_array_equal(encode(x, *q), np.full(SIZE, q[1]))


def test_ties_go_to_the_even_step_whatever_the_zero_point():
  x = np.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5], np.float32)
  even = [-2, -2, 0, 0, 2, 2, 4]
  for zero_point in (8.0, 7.0):
    np.testing.assert_array_equal(fake_quant(x, 1.0, zero_point, 4), even)


@pytest.mark.parametrize('bits', ALL_BITS)
def test_there_are_two_to_the_bits_codes(bits):
  x = np.arange(-10, 2**bits + 10, dtype=np.float32)
  codes = np.unique(encode(x, 1.0, 0.0, bits))
  np.testing.assert_array_equal(codes, np.arange(2**bits))


def test_infinities_are_clipped_and_nan_is_seen():
  x = np.array([np.inf, -np.inf, np.nan], np.float32)
  np.testing.assert_array_equal(fake_quant(x, 0.5, 2.0, 2), [0.5, -1, np.nan])


@pytest.mark.parametrize('bits', [17, 24, 32])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16, jnp.float16])
def test_more_than_16_bits_is_the_identity_bit_for_bit(bits, dtype):
  odd = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, 6e4, -7.1]
  x = jnp.asarray(np.concatenate([gaussian(), odd]), dtype)
  same = fake_quant(x, 0.1, 3.0, bits)
  assert same.dtype == dtype
  assert np.asarray(same).tobytes() == np.asarray(x).tobytes()


def test_more_than_16_bits_passes_the_gradient_of_every_value():
  x = 100 * gaussian()
  gradient = jax.grad(lambda x: fq.fake_quant(x, 0.1, 3.0, 17).sum())(x)
  np.testing.assert_array_equal(gradient, np.ones_like(x))


def test_bits_may_be_python_numpy_traced_or_batched():
  x, scale, zero_point = gaussian(), np.float32(0.03), np.float32(2)
  widths = np.array([*ALL_BITS, 17, 32])
  alone = np.stack(
    [fq.fake_quant(x, scale, zero_point, int(b)) for b in widths]
  )
  traced = np.stack([fake_quant(x, scale, zero_point, b) for b in widths])
  batched = jax.vmap(fq.fake_quant, (None, None, None, 0))
  np.testing.assert_array_equal(traced, alone)
  np.testing.assert_array_equal(batched(x, scale, zero_point, widths), alone)


def test_scales_and_zero_points_broadcast_along_channels():
  x = gaussian(size=60).reshape(5, 3, 4)
  scale = np.array([0.1, 0.2, 0.4], np.float32).reshape(1, 3, 1)
  zero_point = np.array([0.0, 4.0, 7.0], np.float32).reshape(1, 3, 1)
  whole = fake_quant(x, scale, zero_point, 3)
  for c in range(3):
    one = fake_quant(x[:, c], scale[0, c, 0], zero_point[0, c, 0], 3)
    np.testing.assert_array_equal(whole[:, c], one)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_a_narrow_float_keeps_its_dtype(dtype):
  x = jnp.asarray(gaussian(), dtype)
  narrow = fake_quant(x, 0.25, 8.0, 4)
  assert narrow.dtype == dtype
  wide = fake_quant(x.astype(jnp.float32), 0.25, 8.0, 4)
  np.testing.assert_array_equal(narrow, wide.astype(dtype))
  gradient = jax.grad(
    lambda x: fq.fake_quant(x, 0.25, 8.0, 4).astype(jnp.float32).sum()
  )(x)
  assert gradient.dtype == dtype


# The step, zero point and width of: signed, unsigned and affine quantizers.
TRAINED = [(0.2, 4.0, 3), (0.1, 0.0, 4), (0.3, 1.0, 2), (0.01, 90.0, 8)]


def clipped(x, scale, zero_point, bits):
  """Where x lies below or above what LSQ's Q_N and Q_P reach."""
  low, high = -zero_point, 2**bits - 1 - zero_point
  return x / scale <= low, x / scale >= high


@pytest.mark.parametrize('q', TRAINED)
def test_the_gradient_is_one_inside_the_range_and_zero_where_clipped(q):
  x = gaussian()
  below, above = clipped(x, *q)
  expected = np.where(below | above, 0, 1)
  assert 0 < expected.mean() < 1
  gradient = jax.grad(lambda x: fq.fake_quant(x, *q).sum())(x)
  np.testing.assert_array_equal(gradient, expected)


def lsq_scale_gradient(x, scale, zero_point, bits):
  """The derivative by scale, an element each; Esser et al. 2020, equation 3."""
  below, above = clipped(x, scale, zero_point, bits)
  inside = np.rint(x / scale) - x / scale
  high = 2**bits - 1 - zero_point
  return np.where(below, -zero_point, np.where(above, high, inside))


@pytest.mark.parametrize('q', TRAINED)
def test_the_scale_gradient_is_that_of_lsq(q):
  x, (scale, *rest) = gaussian(), q
  held = lambda scale: fq.fake_quant(x, scale, *rest)
  _, tangent = jax.jvp(held, (scale,), (1.0,))
  expected = lsq_scale_gradient(x.astype(np.float64), *q)
  np.testing.assert_allclose(tangent, expected, atol=1e-4)


def test_the_scale_gradient_of_a_channel_is_the_sum_over_its_values():
  x = gaussian(size=120).reshape(40, 3)
  scale = np.array([[0.1, 0.2, 0.4]], np.float32)
  weight = gaussian(1, 120).reshape(40, 3)
  loss = lambda scale: jnp.sum(weight * fq.fake_quant(x, scale, 4.0, 3))
  expected = (weight * lsq_scale_gradient(x, scale, 4.0, 3)).sum(0)
  np.testing.assert_allclose(jax.grad(loss)(scale)[0], expected, rtol=1e-4)


@pytest.mark.parametrize('q', TRAINED)
def test_gradients_under_jit_and_vmap_over_bits_are_the_same(q):
  x, (scale, zero_point, bits) = gaussian(), q

  def gradients(bits):
    loss = lambda x, scale: fq.fake_quant(x, scale, zero_point, bits).sum()
    return jax.grad(loss, (0, 1))(x, scale)

  by_x, by_scale = gradients(bits)
  batched_x, batched_scale = jax.jit(jax.vmap(gradients))(jnp.array([bits, 17]))
  np.testing.assert_array_equal(batched_x[0], by_x)
  np.testing.assert_allclose(batched_scale[0], by_scale, rtol=1e-4)
  np.testing.assert_array_equal(batched_x[1], np.ones_like(x))
  assert batched_scale[1] == 0


@pytest.mark.parametrize('bits', [-3, 0, 1])
def test_less_than_2_bits_counts_as_2(bits):
  x = gaussian()
  narrow = fake_quant(x, 0.5, 2.0, bits)
  np.testing.assert_array_equal(narrow, fake_quant(x, 0.5, 2.0, 2))
