"""A quantized network is one of whole numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nemo_jax
from nemo_jax.quantization.numerics.bank import Bank
from tests.quantization.networks import WIDTHS_TRIED, on_grid


def integers(x, table, bits):
  """(codes less the zero point int64, scale float64)."""
  scale, zero_point = (np.asarray(c[bits - 2], np.float32) for c in table)
  codes = np.rint(np.asarray(x, np.float32) * (1 / scale)) + zero_point
  codes = np.clip(codes, 0, 2**bits - 1).astype(np.int64)
  return codes - zero_point.astype(np.int64), scale.astype(np.float64)


def integer_conv(x, kernel, stride=1, groups=1):
  """SAME convolution of int64."""
  (height, width), size = x.shape[1:3], kernel.shape[0]
  rows, columns = -(-height // stride), -(-width // stride)
  pads = [
    max((out - 1) * stride + size - length, 0)
    for out, length in ((rows, height), (columns, width))
  ]
  pads = [(0, 0), *((p // 2, p - p // 2) for p in pads), (0, 0)]
  x = np.pad(x, pads).reshape(
    len(x), -1, width + sum(pads[2]), groups, kernel.shape[2]
  )
  kernel = kernel.reshape(*kernel.shape[:3], groups, -1)
  out = np.zeros((len(x), rows, columns, *kernel.shape[3:]), np.int64)
  for i, j in np.ndindex(size, size):
    seen = x[:, i:, j:][
      :, : rows * stride : stride, : columns * stride : stride
    ]
    out += np.einsum('bhwgc,cgo->bhwgo', seen, kernel[i, j])
  return out.reshape(*out.shape[:3], -1)


def integer_reference(v, images, ranges, bits):
  """`residual_net` with integer products, scales and biases in float64."""
  tables = list(zip(ranges, np.asarray(bits).tolist(), strict=True))

  def layer(name, x, product):
    (x, step), (w, steps) = (
      integers(value, *tables.pop(0)) for value in (x, v[name]['w'])
    )
    bias = np.asarray(v[name]['b'], np.float64)
    return product(x, w) * (step * steps.reshape(-1)) + bias

  strided = functools.partial(integer_conv, stride=2)
  grouped = functools.partial(integer_conv, groups=4)
  x = np.maximum(layer('stem', images, strided), 0)
  y = np.maximum(layer('depthwise', x, grouped), 0)
  y = layer('project', y, integer_conv)
  x = np.maximum(x + y, 0).mean((1, 2))
  return layer('head', x, np.matmul)


@pytest.mark.parametrize(
  'bits', WIDTHS_TRIED, ids=lambda b: ''.join(map(str, b))
)
def test_the_network_is_that_of_integer_arithmetic(
  residual, exact_ranges, bits
):
  _, variables, images, quantized = residual
  # In place of the fitted ranges, some whose every product is exact in float32:
  # nothing is near a tie that is not one, and all of it has to be equal.
  run = jax.jit(quantized.apply)
  actual = run(variables, images, jnp.asarray(bits), Bank(exact_ranges))
  expected = integer_reference(variables, images, exact_ranges, bits)
  np.testing.assert_array_equal(actual, expected.astype(np.float32))
  assert len(np.unique(actual)) > 10


@pytest.mark.parametrize(
  ('calibration', 'scheme'),
  [
    ('least_squares', 'symmetric'),
    ('least_squares', 'asymmetric'),
    ('percentile', 'asymmetric'),
  ],
)
def test_the_calibrated_network_is_that_of_integer_arithmetic(
  residual, calibration, scheme
):
  apply, variables, images, quantized = residual
  options = {'weight_scheme': scheme, 'calibration': calibration}
  ranges = nemo_jax.quantize(apply, variables, images, **options).bank.ranges
  run = jax.jit(quantized.apply)
  for bits in WIDTHS_TRIED:
    actual = run(variables, images, jnp.asarray(bits), Bank(ranges))
    expected = integer_reference(variables, images, ranges, bits)
    off = np.abs(actual - expected)
    # A value within float32's error of a tie may go to the other code.
    assert np.median(off) < 1e-6
    assert off.max() < 0.05


@pytest.mark.parametrize('batch', [1, 6, 9])
def test_any_number_of_images_will_do(residual, exact_ranges, batch):
  _, variables, images, quantized = residual
  images = jnp.tile(images, (2, 1, 1, 1))[:batch]
  bits = jnp.asarray(WIDTHS_TRIED[-1])
  actual = jax.jit(quantized.apply)(variables, images, bits, Bank(exact_ranges))
  expected = integer_reference(variables, images, exact_ranges, bits)
  np.testing.assert_array_equal(actual, expected.astype(np.float32))


def test_other_variables_may_be_given(residual, exact_ranges):
  _, variables, images, quantized = residual
  other = jax.tree.map(lambda x: on_grid(0.7 * x, 8), variables)
  bits = jnp.asarray(WIDTHS_TRIED[-1])
  actual = jax.jit(quantized.apply)(other, images, bits, Bank(exact_ranges))
  expected = integer_reference(other, images, exact_ranges, bits)
  np.testing.assert_array_equal(actual, expected.astype(np.float32))
