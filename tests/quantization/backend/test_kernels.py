"""Kernels for GPUs, interpreted on a CPU, against XLA's convolutions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_jax.quantization.backend import kernels

SIDES = st.tuples(st.integers(0, 2), st.integers(0, 2))


def draw(seed, *shape, most=127):
  """Whole numbers in bfloat16."""
  found = np.random.default_rng(seed).integers(-most, most + 1, shape)
  return jnp.asarray(found, jnp.bfloat16)


def sums(convolution):
  """What XLA makes of a convolution, in float32."""
  images, kernel, strides, padding = convolution
  return jax.lax.conv_general_dilated(
    images.astype(jnp.float32),
    kernel.astype(jnp.float32),
    strides,
    padding,
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )


def convolve(convolutions, tail, operands, dtypes):
  run = functools.partial(kernels.convolve, interpret=True)
  return run(convolutions, tail, operands, dtypes)


@settings(max_examples=12)
@given(
  st.tuples(st.integers(1, 3), st.integers(1, 3)),
  st.tuples(st.integers(1, 2), st.integers(1, 2)),
  st.tuples(SIDES, SIDES),
  st.sampled_from([32, 64, 96]),
  st.integers(1, 3),
)
def test_sums_are_those_of_a_convolution(
  window, strides, padding, channels, count
):
  images, kernel = (
    draw(0, count, 7, 6, channels),
    draw(1, *window, channels, 32),
  )
  convolution = kernels.Convolution(images, kernel, strides, padding)
  (out,) = convolve([convolution], lambda s, _: s, [], [jnp.float32])
  np.testing.assert_array_equal(out, sums(convolution))


@settings(max_examples=6)
@given(
  st.tuples(st.integers(2, 7), st.integers(2, 7)),
  st.tuples(SIDES, SIDES),
  st.sampled_from([1, 3]),
)
def test_first_layers_of_few_channels_are_the_same(window, padding, channels):
  images, kernel = draw(0, 2, 9, 8, channels), draw(1, *window, channels, 32)
  convolution = kernels.Convolution(images, kernel, (2, 2), padding)
  shapes = images.shape, kernel.shape
  assert kernels.suits(*shapes, (2, 4, 4, 32), (2, 2))
  assert not kernels.suits(*shapes, (2, 9, 8, 32), (1, 1))
  (out,) = convolve([convolution], lambda s, _: s, [], [jnp.float32])
  np.testing.assert_array_equal(out, sums(convolution))


@pytest.mark.parametrize('channels', [32, 128])
@pytest.mark.parametrize('window', [1, 3])
def test_a_tail_reads_numbers_channels_and_images(window, channels):
  edges = (window // 2,) * 2
  images, kernel = draw(0, 3, 5, 5, 64), draw(1, window, window, 64, channels)
  convolution = kernels.Convolution(images, kernel, (1, 1), (edges, edges))
  normal = np.random.default_rng(2).normal
  scale = normal(size=channels).astype(np.float32)
  shortcut = normal(size=(3, 5, 5, channels)).astype(np.float32)
  step = np.float32([0.01])

  def tail(tiles, operands):
    (total,), (scale, shortcut, step) = tiles, operands
    y = jnp.maximum(total * scale + shortcut, 0)
    return [y, kernels.nearest(jnp.clip(y * step, 0, 255))]

  y, codes = convolve(
    [convolution],
    tail,
    [scale, shortcut, step],
    [jnp.float32, jnp.bfloat16],
  )
  expected = jax.jit(
    lambda: jnp.maximum(sums(convolution) * scale + shortcut, 0)
  )()
  np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-4)
  np.testing.assert_array_equal(
    codes, jnp.round(jnp.clip(y * step, 0, 255)).astype(jnp.bfloat16)
  )
  assert (y.dtype, codes.dtype) == (jnp.float32, jnp.bfloat16)


def test_two_convolutions_share_a_tile():
  one = kernels.Convolution(
    draw(0, 2, 4, 4, 32), draw(1, 1, 1, 32, 64), (1, 1), ((0, 0), (0, 0))
  )
  other = kernels.Convolution(
    draw(2, 2, 8, 8, 64), draw(3, 3, 3, 64, 64), (2, 2), ((1, 1), (1, 1))
  )
  add = lambda tiles, _: [tiles[0] - 2 * tiles[1]]
  (out,) = convolve([one, other], add, [], [jnp.float32])
  np.testing.assert_array_equal(out, sums(one) - 2 * sums(other))


def test_a_kernel_may_be_mapped_over_weights():
  images, many = draw(0, 2, 4, 4, 32), draw(1, 3, 1, 1, 32, 32)

  def apply(kernel):
    one = kernels.Convolution(images, kernel, (1, 1), ((0, 0), (0, 0)))
    return convolve([one], lambda s, _: s, [], [jnp.float32])[0]

  np.testing.assert_array_equal(
    jax.vmap(apply)(many), jnp.stack([apply(kernel) for kernel in many])
  )


@given(st.floats(-1000, 1000, width=32))
def test_nearest_is_round(x):
  x = jnp.float32(x)
  assert kernels.nearest(x) == jnp.round(x)


def test_ties_go_to_even():
  ties = np.arange(-9, 10, dtype=np.float32) / 2
  np.testing.assert_array_equal(kernels.nearest(ties), np.round(ties))


@pytest.mark.parametrize('pick', ['maximum', 'minimum'])
def test_what_is_no_number_stays_none(pick):
  one = jnp.array([1.0, jnp.nan, 2.0, jnp.nan, -jnp.inf])
  other = jnp.array([3.0, 0.0, jnp.nan, jnp.inf, 5.0])
  np.testing.assert_array_equal(
    getattr(kernels, pick)(one, other), getattr(jnp, pick)(one, other)
  )


@pytest.mark.parametrize(
  ('images', 'kernel', 'sizes'),
  [
    ((2, 8, 8, 48), (1, 1, 48, 64), (8, 8)),
    ((2, 8, 8, 64), (1, 1, 64, 24), (8, 8)),
    ((2**15, 64, 64, 64), (1, 1, 64, 64), (64, 64)),
    ((2**17, 1, 1, 64), (3, 3, 64, 64), (32, 32)),
    ((2, 2, 2, 64), (3, 3, 64, 64), (0, 0)),
  ],
  ids=['in', 'out', 'addresses', 'outputs', 'empty'],
)
def test_other_shapes_have_no_kernel(images, kernel, sizes):
  out = (images[0], *sizes, kernel[-1])
  assert not kernels.suits(images, kernel, out, (1, 1))
