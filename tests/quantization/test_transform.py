"""`quantize` on networks that the package never saw."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nemo_jax
from nemo_jax.core.types import InputError
from nemo_jax.quantization import costs
from nemo_jax.quantization.numerics.bank import Bank
from tests.quantization.networks import (
  IMAGES,
  ROWS,
  STACK,
  WEIGHT,
  WIDTHS_TRIED,
  assert_float_beyond_16_bits,
  dense,
  normal,
  quick_quantize,
  residual_net,
  uniform,
)

# Bits as data.


def test_the_network_is_itself_beyond_16_bits(residual):
  apply, variables, images, quantized = residual
  assert_float_beyond_16_bits(quantized, apply, variables, images)


def test_a_network_at_many_bits_is_close_to_itself(residual):
  apply, variables, images, quantized = residual
  expected = np.asarray(apply(variables, images))
  run = jax.jit(quantized.apply)
  off = [
    np.abs(run(variables, images, uniform(quantized, bits)) - expected).max()
    for bits in (4, 6, 8, 12, 16)
  ]
  assert (np.diff(off) < 0).all()
  assert off[-1] < 1e-3 * np.abs(expected).max()


def test_one_program_serves_all_bits(residual):
  _, variables, images, quantized = residual
  run = jax.jit(lambda *given: quantized.apply(*given))
  outputs = [
    run(variables, images, uniform(quantized, bits)) for bits in range(2, 33)
  ]
  run(variables, images, jnp.asarray(WIDTHS_TRIED[-1]))
  assert run._cache_size() == 1
  assert len({np.asarray(x).tobytes() for x in outputs}) == 15 + 1


def test_configurations_can_be_batched(residual, exact_ranges):
  _, variables, images, quantized = residual
  run = lambda bits: quantized.apply(
    variables, images, bits, Bank(exact_ranges)
  )
  configurations = jnp.asarray(WIDTHS_TRIED)
  alone = np.stack([jax.jit(run)(bits) for bits in configurations])
  batched = jax.jit(jax.vmap(run))(configurations)
  np.testing.assert_array_equal(batched, alone)


def test_bits_may_be_an_array_outside_jit():
  quantized = quick_quantize(dense, STACK, ROWS)
  run = lambda bits: np.asarray(quantized.apply(STACK, ROWS, bits))
  traced = jax.jit(quantized.apply)(STACK, ROWS, jnp.asarray([4, 17]))
  assert (run(np.asarray([4, 17])) == run(jnp.asarray([4, 17]))).all()
  np.testing.assert_allclose(run(np.asarray([4, 17])), traced, rtol=1e-6)


def test_more_than_16_bits_are_32_in_every_count():
  quantized = quick_quantize(lambda v, x: x @ v['w'], WEIGHT, IMAGES)
  table = quantized.costs
  for bits in ([17, 17], [10**12, 10**12], np.asarray([32, 99], np.int8)):
    assert costs.model_size(table, bits) == table.overhead_bits + 12 * 32
    assert costs.bit_operations(table, bits) == 5 * 12 * 32 * 32
    np.testing.assert_allclose(costs.bit_operation_ratio(table, bits), 1)
    np.testing.assert_array_equal(
      quantized.apply(WEIGHT, IMAGES, bits), IMAGES @ WEIGHT['w']
    )


# Gradients.


def test_every_variable_has_a_gradient(residual):
  _, variables, images, quantized = residual
  target = normal(5, 6, 5)

  @jax.jit
  def gradient(variables, bits):
    loss = lambda v: jnp.mean((quantized.apply(v, images, bits) - target) ** 2)
    return jax.grad(loss)(variables)

  @jax.jit
  @jax.grad
  def exact(variables):
    return jnp.mean((residual_net(variables, images) - target) ** 2)

  for bits in (2, 4, 8, 32):
    found = gradient(variables, uniform(quantized, bits))
    for leaf in jax.tree.leaves(found):
      assert np.isfinite(leaf).all()
      assert np.any(leaf)
  expected = jax.tree.leaves(exact(variables))
  for a, b in zip(jax.tree.leaves(found), expected, strict=True):
    np.testing.assert_allclose(a, b, 1e-4, 1e-6)


def test_training_at_few_bits_lowers_the_loss(residual):
  _, variables, images, quantized = residual
  target, bits = normal(5, 6, 5), uniform(quantized, 3)

  @jax.jit
  def step(given):
    def loss(given):
      return jnp.mean(
        (quantized.apply(given[0], images, bits, given[1]) - target) ** 2
      )

    value, slope = jax.value_and_grad(loss)(given)
    return value, jax.tree.map(lambda x, d: x - 0.02 * d, given, slope)

  given, losses = (variables, quantized.bank), []
  for _ in range(40):
    value, given = step(given)
    losses.append(float(value))
  assert losses[-1] < 0.8 * losses[0]


def test_ranges_have_gradients_at_their_width_alone(residual):
  _, variables, images, quantized = residual
  bits = jnp.asarray(WIDTHS_TRIED[-1])

  @jax.jit
  @jax.grad
  def gradient(ranges):
    return jnp.sum(quantized.apply(variables, images, bits, Bank(ranges)) ** 2)

  for width, table in zip(bits, gradient(quantized.bank.ranges), strict=True):
    used = np.asarray(table.scale[width - 2])
    assert np.isfinite(used).all()
    assert np.any(used)
    rest = np.delete(table.scale, width - 2, axis=0)
    np.testing.assert_array_equal(rest, np.zeros_like(rest))


# Calibration.


def test_calibration_may_take_the_images_in_chunks(residual):
  apply, variables, images, _ = residual
  whole, parts = (
    nemo_jax.quantize(apply, variables, images, chunk=chunk).bank.ranges
    for chunk in (6, 4)
  )
  for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
    np.testing.assert_allclose(a, b, rtol=0.01)


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_values_that_are_not_finite_are_named(bad):
  def apply(v, x):
    return (x @ v['a']) @ v['b']

  variables = {'a': normal(0, 4, 4), 'b': normal(1, 4, 4)}
  images = normal(2, 8, 4)
  with pytest.raises(InputError, match='^a:input holds values'):
    nemo_jax.quantize(apply, variables, images.at[0, 0].set(bad))
  variables['b'] = variables['b'].at[0, 0].set(bad)
  with pytest.raises(InputError, match='^b holds values'):
    nemo_jax.quantize(apply, variables, images)


# Errors in what is asked.


@pytest.mark.parametrize(
  ('option', 'value', 'choices'),
  [
    ('calibration', 'best', 'least_squares, min_max, percentile'),
    ('weight_scheme', 'both', 'symmetric, asymmetric'),
    ('extra_ops', ('add', 'mul'), 'add, pool'),
  ],
)
def test_an_unknown_option_lists_the_choices(option, value, choices):
  with pytest.raises(InputError, match=choices) as error:
    nemo_jax.quantize(dense, STACK, ROWS, **{option: value})
  assert option in str(error.value)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  'option', [{'chunk': 0}, {'percentile': 0}, {'percentile': 200}]
)
def test_numbers_out_of_range_are_refused(option):
  variables = {'a': normal(0, 4, 4)}
  with pytest.raises(InputError, match=f'{[*option][0]} is'):
    nemo_jax.quantize(
      lambda v, x: x @ v['a'], variables, normal(2, 8, 4), **option
    )


def test_no_images_are_an_error():
  with pytest.raises(InputError, match='at least one example'):
    nemo_jax.quantize(dense, STACK, ROWS[:0])


@pytest.mark.parametrize(
  'apply', [lambda v, x: jnp.tanh(x), lambda v, x: x + v['w'][0] @ v['w'][1, 0]]
)
def test_a_function_with_nothing_to_quantize_is_an_error(apply):
  with pytest.raises(InputError, match='nothing to quantize'):
    nemo_jax.quantize(apply, STACK, ROWS)


@pytest.mark.parametrize('shape', [(), (7,), (9,), (1, 8)])
def test_bits_of_the_wrong_shape_are_told_the_number_of_quantizers(
  residual, shape
):
  _, variables, images, quantized = residual
  with pytest.raises(InputError, match='there are 8 quantizers'):
    quantized.apply(variables, images, jnp.full(shape, 8))


@pytest.mark.parametrize(
  ('bits', 'words'),
  [
    ([1, 4], 'quantizer 0 has 1 bits; they go from 2'),
    ([4, 0], 'quantizer 1 has 0 bits'),
    ([4, -3], 'quantizer 1 has -3 bits'),
    ([4.0, 4.0], 'bits are of type float64; give whole numbers'),
    ([4.7, 4.0], 'bits are of type float64'),
    ([True, True], 'bits are of type bool'),
    ([4], r'bits has shape \(1,\); there are 2'),
    ([[4, 4]], r'bits has shape \(1, 2\)'),
    (4, r'bits has shape \(\)'),
    (['4', '4'], 'bits are of type <U1'),
  ],
)
def test_bits_that_no_quantizer_has_are_refused(bits, words):
  quantized = quick_quantize(lambda v, x: x @ v['w'], WEIGHT, IMAGES)
  calls = [
    lambda: quantized.apply(WEIGHT, IMAGES, bits),
    lambda: quantized.encode(WEIGHT, bits),
    lambda: costs.model_size(quantized.costs, bits),
    lambda: costs.bit_operations(quantized.costs, bits),
    lambda: costs.size_ratio(quantized.costs, bits),
    lambda: costs.bit_operation_ratio(quantized.costs, bits),
  ]
  for call in calls:
    with pytest.raises(InputError, match=words):
      call()
