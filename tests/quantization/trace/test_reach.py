"""Products out of reach, and what may look as if it could not be quantized."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nemo_jax
from tests.quantization.networks import (
  ROWS,
  STACK,
  assert_float_beyond_16_bits,
  names,
  normal,
  quick_quantize,
  uniform,
)


def scanned(v, x):
  return jax.lax.scan(lambda x, w: (x @ w, None), x, v['w'])[0]


def looped(v, x):
  step = lambda state: (state[0] + 1, state[1] @ v['w'][0])
  return jax.lax.while_loop(lambda s: s[0] < 3, step, (0, x))[1]


def branched(v, x):
  return jax.lax.cond(v['w'].sum() > 0, lambda x: x @ v['w'][0], lambda x: x, x)


def mapped(v, x):
  return jax.lax.map(lambda row: jax.jit(jnp.dot)(row, v['w'][0]), x)


@pytest.mark.parametrize(
  ('apply', 'name'),
  [
    (scanned, 'scan'),
    (looped, 'while'),
    (branched, 'cond'),
    (mapped, 'scan'),
    (lambda v, x: jax.jit(scanned)(v, x), 'scan'),
    (lambda v, x: x @ v['w'][0] + scanned(v, x), 'scan'),
  ],
  ids=['scan', 'while_loop', 'cond', 'map', 'scan in jit', 'scan beside'],
)
def test_a_product_of_the_images_out_of_reach_is_an_error(apply, name):
  with pytest.raises(NotImplementedError, match=f"'{name}'.*dot_general"):
    nemo_jax.quantize(apply, STACK, ROWS)


def power_iteration(v, x):
  """A layer with a weight of spectral norm one, found in a loop."""
  w = v['w'][0]
  step = lambda u, _: (w.T @ (w @ u) / jnp.linalg.norm(w.T @ (w @ u)), None)
  u, _ = jax.lax.scan(step, jnp.ones(4), None, 30)
  return x @ (w / jnp.linalg.norm(w @ u))


def loop_without_product(v, x):
  x = jax.lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x), x)
  x = jax.lax.scan(lambda x, w: (x * w.sum(), None), x, v['w'])[0]
  return jax.lax.cond(True, jnp.sin, jnp.cos, x) @ v['w'][1]


@pytest.mark.parametrize('apply', [power_iteration, loop_without_product])
def test_a_loop_without_products_of_the_images_is_fine(apply):
  quantized = quick_quantize(apply, STACK, ROWS)
  assert names(quantized) == ['w:input', 'w']
  assert_float_beyond_16_bits(quantized, apply, STACK, ROWS)


def integer_product(v, x):
  whole = jnp.floor(4 * x).astype(jnp.int32)
  return (whole @ whole.T).sum() + x @ v['w'][0]


def one_hot_gather(v, x):
  hot = jax.nn.one_hot(jnp.argmax(x, -1), 4)
  return hot @ v['w'][0] + v['w'][1][jnp.argmin(x, -1)]


@pytest.mark.parametrize('apply', [integer_product, one_hot_gather])
def test_integers_and_one_hot_gathers_are_fine(apply):
  quantized = quick_quantize(apply, STACK, ROWS)
  assert [op.kind for op in quantized.operations] == ['dense']
  assert_float_beyond_16_bits(quantized, apply, STACK, ROWS)
  low = quantized.apply(STACK, ROWS, uniform(quantized, 2))
  assert np.isfinite(low).all()


def test_integer_images_are_fine():
  images = jnp.arange(20, dtype=jnp.uint8).reshape(5, 4)
  apply = lambda v, x: (x.astype(jnp.float32) / 255) @ v['w'][0]
  quantized = quick_quantize(apply, STACK, images)
  assert names(quantized) == ['w:input', 'w']
  assert_float_beyond_16_bits(quantized, apply, STACK, images)


def test_keys_captured_or_among_the_variables_are_fine():
  captured = jax.random.key(1)
  variables = {'w': normal(1, 4, 4), 'key': jax.random.key(2)}

  def apply(v, x):
    x = x + jax.random.normal(captured, x.shape)
    return (x * jax.random.bernoulli(v['key'], 0.5, x.shape)) @ v['w']

  quantized = quick_quantize(apply, variables, ROWS)
  assert names(quantized) == ['w:input', 'w']
  assert quantized.costs.parameters == 16
  assert_float_beyond_16_bits(quantized, apply, variables, ROWS)


def scaled(factor):
  return lambda v, x: jnp.pad(x * factor, 1)[1:-1, 1:-1] @ v['w'][0]


@pytest.mark.parametrize(
  'factor',
  [jnp.ones(()), jnp.zeros(()), jnp.ones((), jnp.bfloat16), np.float32(1)],
  ids=['one', 'zero', 'bfloat16', 'numpy'],
)
def test_captured_scalars_are_fine(factor):
  quantized = quick_quantize(scaled(factor), STACK, ROWS)
  assert names(quantized) == ['w:input', 'w']
  assert_float_beyond_16_bits(quantized, scaled(factor), STACK, ROWS)


def test_a_function_that_captured_a_traced_value_may_be_quantized():
  @jax.jit
  def outside(factor):
    quantized = quick_quantize(scaled(factor), STACK, ROWS)
    return quantized.apply(STACK, ROWS, uniform(quantized, 32))

  expected = scaled(3.0)(STACK, ROWS)
  np.testing.assert_allclose(outside(3.0), expected, rtol=1e-5)


def test_outputs_keep_their_structure():
  def apply(v, x):
    x = x @ v['w'][0]
    return {'logits': x, 'rest': (x.sum(), [x > 0, None]), 'input': ROWS}

  quantized = quick_quantize(apply, STACK, ROWS)
  assert_float_beyond_16_bits(quantized, apply, STACK, ROWS)


def test_a_network_in_bfloat16_stays_in_it():
  def apply(v, x):
    w = v['w'].astype(jnp.bfloat16)
    x = jax.nn.relu(x.astype(jnp.bfloat16) @ w[0])
    return x @ w[1] + x @ w[2]

  quantized = quick_quantize(apply, STACK, ROWS)
  assert [q.is_weight for q in quantized.quantizers] == [0, 1, 0, 1, 1]
  assert_float_beyond_16_bits(quantized, apply, STACK, ROWS)
  run = jax.jit(quantized.apply)
  low = run(STACK, ROWS, uniform(quantized, 4))
  assert low.dtype == jnp.bfloat16
