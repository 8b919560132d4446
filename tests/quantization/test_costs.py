"""Multiply-accumulates, model sizes and bit-operations against hand counts."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nemo_jax
from nemo_jax.quantization import costs as costs_lib
from nemo_jax.quantization.trace import analysis as analysis_lib
from nemo_jax.quantization.trace import program as program_lib


def ones(*shape):
  return jnp.ones(shape, jnp.float32)


def macs(apply, images, **variables):
  """MACs of the one operation that a function consists of."""
  program = program_lib.flatten(jax.make_jaxpr(apply)(variables, images))
  analysis = analysis_lib.analyze(program, sorted(variables), len(images))
  (operation,) = analysis.operations
  return operation.macs


def layer_macs(layer, *shape):
  """MACs of a Flax layer for one image, at every size of the batch."""
  counts = set()
  for batch in (1, 2, 5):
    images = ones(batch, *shape)
    variables = jax.eval_shape(layer.init, jax.random.key(0), images)
    kernel, bias = (variables['params'][k] for k in ('kernel', 'bias'))

    def apply(v, x):
      return layer.apply({'params': v}, x)

    counts.add(macs(apply, images, kernel=kernel, bias=bias))
  (count,) = counts
  return count


# Layers.


@pytest.mark.parametrize(
  ('layer', 'shape', 'by_hand'),
  [
    # Output positions x output channels x taps x input channels of a group.
    (nn.Conv(8, (3, 3)), (10, 12, 5), (10 * 12) * 8 * (3 * 3) * 5),
    (nn.Conv(8, (3, 5)), (10, 12, 5), (10 * 12) * 8 * (3 * 5) * 5),
    (nn.Conv(8, (1, 1)), (10, 12, 5), (10 * 12) * 8 * 5),
    (nn.Conv(8, (3,)), (10, 5), 10 * 8 * 3 * 5),
    (nn.Conv(8, (2, 2, 2)), (4, 5, 6, 3), (4 * 5 * 6) * 8 * (2 * 2 * 2) * 3),
    (nn.Conv(8, (3, 3), 2), (10, 13, 5), (5 * 7) * 8 * (3 * 3) * 5),
    (nn.Conv(8, (3, 3), (3, 1)), (10, 13, 5), (4 * 13) * 8 * (3 * 3) * 5),
    (
      nn.Conv(8, (3, 3), padding='VALID'),
      (10, 12, 5),
      (8 * 10) * 8 * (3 * 3) * 5,
    ),
    (
      nn.Conv(8, (3, 3), 2, padding=((2, 1), (0, 0))),
      (10, 12, 5),
      (6 * 5) * 8 * (3 * 3) * 5,
    ),
    (
      nn.Conv(8, (3, 3), feature_group_count=2),
      (10, 12, 6),
      (10 * 12) * 8 * (3 * 3) * 3,
    ),
    (
      nn.Conv(6, (3, 3), feature_group_count=6),
      (10, 12, 6),
      (10 * 12) * 6 * (3 * 3),
    ),
    (
      nn.Conv(12, (3, 3), 2, feature_group_count=6),
      (10, 12, 6),
      (5 * 6) * 12 * (3 * 3),
    ),
    (
      nn.Conv(8, (3, 3), kernel_dilation=2),
      (10, 12, 5),
      (10 * 12) * 8 * (3 * 3) * 5,
    ),
    (
      nn.Conv(8, (3, 3), kernel_dilation=2, padding='VALID'),
      (10, 12, 5),
      (6 * 8) * 8 * (3 * 3) * 5,
    ),
    # Each input position is spread over every tap.
    (nn.ConvTranspose(8, (4, 4), (2, 2)), (5, 7, 3), (5 * 7) * 8 * (4 * 4) * 3),
    (nn.ConvTranspose(8, (3,), (1,)), (5, 3), 5 * 8 * 3 * 3),
    (nn.ConvTranspose(8, (3,), (3,)), (5, 3), 5 * 8 * 3 * 3),
    (nn.Dense(7), (11,), 11 * 7),
    (nn.Dense(7), (4, 5, 11), (4 * 5) * 11 * 7),
    (nn.DenseGeneral((2, 3), axis=(1, 2)), (5, 11), 5 * 11 * 2 * 3),
  ],
)
def test_macs_of_a_layer_are_those_counted_by_hand(layer, shape, by_hand):
  assert layer_macs(layer, *shape) == by_hand


@pytest.mark.parametrize('batch', [1, 3])
@pytest.mark.parametrize(
  ('equation', 'shape', 'weight', 'by_hand'),
  [
    ('bhqd,bhkd->bhqk', (4, 6, 5), None, 4 * 6 * 6 * 5),
    ('bij,bkj->bik', (6, 5), None, 6 * 6 * 5),
    ('bhtd,hde->bhte', (4, 6, 5), (4, 5, 3), 4 * 6 * 5 * 3),
    ('btd,de->bte', (6, 5), (5, 3), 6 * 5 * 3),
    ('btd,ed->bet', (6, 5), (3, 5), 6 * 5 * 3),
    ('bd,d->b', (5,), (5,), 5),
  ],
)
def test_macs_of_a_batched_product_are_those_counted_by_hand(
  equation, shape, weight, by_hand, batch
):
  images = ones(batch, *shape)
  if weight is None:
    apply = lambda v, x: jnp.einsum(equation, x, x)
    assert macs(apply, images) == by_hand
  else:
    apply = lambda v, x: jnp.einsum(equation, x, v['w'])
    assert macs(apply, images, w=ones(*weight)) == by_hand


# A network: one convolution, and two layers that share an activation, one of
# them by a weight that is used twice.

SIZES = {'conv': 3 * 3 * 2 * 4, 'left': 64 * 3, 'tied': 3 * 3}
MACS = {'conv': 4 * 4 * 72, 'left': 64 * 3, 'tied': 9}
PLAIN = 4 + 3  # biases; a variable that nothing reads is not stored


def network(v, x):
  x = jax.lax.conv_general_dilated(
    x,
    v['conv']['kernel'],
    (1, 1),
    'SAME',
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )
  x = jax.nn.relu(x + v['conv']['bias']).reshape(len(x), -1)
  x = jax.nn.relu(x @ v['left']['kernel'] + v['left']['bias'])
  x = jnp.tanh(x @ v['tied']['kernel'])
  return x @ v['tied']['kernel']


@pytest.fixture(scope='module')
def inputs():
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  variables = {
    'conv': {'kernel': draw(3, 3, 2, 4), 'bias': draw(4)},
    'left': {'kernel': draw(64, 3), 'bias': draw(3)},
    'tied': {'kernel': draw(3, 3)},
    'unused': draw(5),
    'steps': jnp.zeros((2, 2), jnp.int32),
  }
  return network, variables, draw(3, 4, 4, 2)


@pytest.fixture(scope='module')
def symmetric(inputs):
  """Costs with the channelwise symmetric scheme."""
  return nemo_jax.quantize(*inputs, calibration='min_max').costs


@pytest.fixture(scope='module')
def asymmetric(inputs):
  """Costs with one scale and zero point a tensor."""
  options = {'calibration': 'min_max', 'weight_scheme': 'asymmetric'}
  return nemo_jax.quantize(*inputs, **options).costs


# conv:input, conv/kernel, left:input, left/kernel, tied:input, tied/kernel,
# tied#2:input.
MIXED = np.asarray([8, 3, 7, 2, 5, 4, 16])
NUM_ACTIVATIONS = 4


def test_parameters_are_those_of_the_float_network(symmetric):
  assert symmetric.parameters == sum(SIZES.values()) + PLAIN
  assert symmetric.elements.tolist() == [0, 72, 0, 192, 0, 9, 0]


def test_the_model_size_is_exact(symmetric):
  weight_bits = 72 * 3 + 192 * 2 + 9 * 4
  scales = 4 + 3 + 3 + NUM_ACTIVATIONS
  zero_points = NUM_ACTIVATIONS
  by_hand = weight_bits + 32 * (scales + zero_points + PLAIN)
  assert costs_lib.model_size(symmetric, MIXED) == by_hand


def test_asymmetric_weights_have_one_scale_and_one_zero_point(asymmetric):
  weight_bits = 72 * 3 + 192 * 2 + 9 * 4
  scales = zero_points = 3 + NUM_ACTIVATIONS
  by_hand = weight_bits + 32 * (scales + zero_points + PLAIN)
  assert costs_lib.model_size(asymmetric, MIXED) == by_hand


def test_bits_of_activations_leave_the_size_as_it_is(symmetric):
  more = MIXED + np.asarray([1, 0, 1, 0, 1, 0, 0])
  sizes = [costs_lib.model_size(symmetric, b) for b in (MIXED, more)]
  assert sizes[0] == sizes[1]


def test_bit_operations_are_exact(symmetric):
  product = 1152 * 8 * 3 + 192 * 7 * 2 + 9 * 5 * 4 + 9 * 16 * 4
  larger = 1152 * 8 + 192 * 7 + 9 * 5 + 9 * 16
  assert costs_lib.bit_operations(symmetric, MIXED) == product
  assert costs_lib.bit_operations(symmetric, MIXED, 'larger') == larger
  assert symmetric.macs.tolist() == [1152, 192, 9, 9]
  assert symmetric.operands.tolist() == [[0, 1], [2, 3], [4, 5], [6, 5]]


configurations = st.lists(st.integers(2, 16), min_size=7, max_size=7)


@settings(max_examples=50, deadline=None)
@given(bits=configurations)
def test_the_size_ratio_is_that_of_the_exact_size(symmetric, asymmetric, bits):
  for costs in (symmetric, asymmetric):
    exact = costs_lib.model_size(costs, bits) / (32 * costs.parameters)
    ratio = costs_lib.size_ratio(costs, jnp.asarray(bits))
    assert ratio.dtype == jnp.float32
    np.testing.assert_allclose(ratio, exact, rtol=1e-6)


@settings(max_examples=50, deadline=None)
@given(bits=configurations)
@pytest.mark.parametrize('precision', ['product', 'larger'])
def test_the_ratio_of_bit_operations_is_that_of_the_exact_count(
  symmetric, precision, bits
):
  count = lambda bits: costs_lib.bit_operations(symmetric, bits, precision)
  exact = count(bits) / count([32] * 7)
  bits = jnp.asarray(bits)
  ratio = costs_lib.bit_operation_ratio(symmetric, bits, precision)
  assert ratio.dtype == jnp.float32
  np.testing.assert_allclose(ratio, exact, rtol=1e-6)


@pytest.mark.parametrize('bits', [2, 3, 4, 8, 16, 32])
def test_at_equal_bits_the_ratios_are_those_of_the_bits(symmetric, bits):
  everywhere = jnp.full(7, bits)
  product = costs_lib.bit_operation_ratio(symmetric, everywhere, 'product')
  larger = costs_lib.bit_operation_ratio(symmetric, everywhere, 'larger')
  np.testing.assert_allclose(product, bits * bits / 1024, rtol=1e-6)
  np.testing.assert_allclose(larger, bits / 32, rtol=1e-6)
  # Beside the weights themselves, scales and zero points are stored.
  constants = 32 * (10 + 2 * NUM_ACTIVATIONS + PLAIN)
  weights = bits * sum(SIZES.values())
  size = costs_lib.size_ratio(symmetric, everywhere)
  expected = (weights + constants) / (32 * symmetric.parameters)
  np.testing.assert_allclose(size, expected, rtol=1e-6)


def test_ratios_can_be_traced_and_batched(symmetric):
  bits = jnp.asarray([MIXED, np.maximum(MIXED - 1, 2), MIXED + 1])
  for ratio in (costs_lib.size_ratio, costs_lib.bit_operation_ratio):
    alone = jnp.stack([ratio(symmetric, b) for b in bits])
    batched = jax.jit(jax.vmap(lambda b, r=ratio: r(symmetric, b)))(bits)
    np.testing.assert_allclose(batched, alone, rtol=1e-6)


def test_counts_beyond_32_bits_are_exact():
  costs = costs_lib.Costs(
    elements=np.asarray([0, 10**12]),
    overhead_bits=7,
    parameters=10**12,
    macs=np.asarray([10**15, 1]),
    operands=np.asarray([[0, 1], [0, 1]]),
  )
  bits = np.asarray([8, 16], np.int32)
  assert costs_lib.model_size(costs, bits) == 16 * 10**12 + 7
  assert costs_lib.bit_operations(costs, bits) == 128 * (10**15 + 1)
  assert costs_lib.bit_operations(costs, bits, 'larger') == 16 * (10**15 + 1)
  np.testing.assert_allclose(costs_lib.size_ratio(costs, bits), 0.5, rtol=1e-6)
  ratio = costs_lib.bit_operation_ratio(costs, bits)
  np.testing.assert_allclose(ratio, 1 / 8, rtol=1e-6)


def test_a_product_of_two_activations_counts_the_bits_of_both(inputs):
  _, _, images = inputs
  apply = lambda v, x: jnp.einsum('bhwc,bhvc->bhwv', x, 2 * x)
  costs = nemo_jax.quantize(apply, {}, images, calibration='min_max').costs
  assert costs_lib.bit_operations(costs, [3, 5]) == (4 * 4 * 4 * 2) * 3 * 5
  assert costs.parameters == 0


def test_operations_that_multiply_nothing_are_free(inputs):
  _, variables, images = inputs

  def apply(v, x):
    y = x + nn.avg_pool(x, (3, 3), (1, 1), padding='SAME')
    return y.mean((1, 2)) @ v['left']['kernel'][:2]

  quantized = nemo_jax.quantize(
    apply, variables, images, calibration='min_max', extra_ops=('add', 'pool')
  )
  assert {op.kind for op in quantized.operations} == {'add', 'pool', 'dense'}
  assert quantized.costs.macs.tolist() == [2 * 3]
