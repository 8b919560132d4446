"""What a network stores: tables, captured arrays, what images meet."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemo_jax.quantization import costs, transform
from tests.quantization.networks import IMAGES, WORDS, normal, quick_quantize

TABLE = {'table': normal(2, 10, 4)}


# A table that is looked up and multiplied.


def held(network, variables, bits):
  """The table as b bits hold it."""
  (index,) = [i for i, q in enumerate(network.quantizers) if q.is_weight]
  scale, zero = network.bank.ranges[index].at(bits)
  table = variables['table']
  codes = jnp.clip(jnp.round(table / scale) + zero, 0, 2**bits - 1)
  return (codes - zero) * scale


LOOK_UPS = {
  'take': lambda t, x: jnp.take(t, x, axis=0),
  'index': lambda t, x: t[x],
  'clipped': lambda t, x: t.at[x].get(mode='clip'),
  'vmap': lambda t, x: jax.vmap(lambda row: t[row])(x),
  'dynamic slice': lambda t, x: jax.vmap(
    jax.vmap(lambda i: jax.lax.dynamic_slice(t, (i, 0), (1, 4))[0])
  )(x),
}


@pytest.mark.parametrize('look_up', LOOK_UPS)
@pytest.mark.parametrize('bits', [2, 8])
def test_every_use_of_a_tied_table_sees_the_quantized_one(look_up, bits):
  of = LOOK_UPS[look_up]
  apply = lambda v, x: of(v['table'], x).mean(1) @ v['table'].T
  network = quick_quantize(apply, TABLE, WORDS)
  assert [q.name for q in network.quantizers] == ['table:input', 'table']
  assert network.quantizers[1].channels == 1
  by_hand = 40 * bits + 32 + 64
  assert costs.model_size(network.costs, [bits, bits]) == by_hand
  found = network.apply(TABLE, WORDS, np.asarray([32, bits]))
  expected = apply({'table': held(network, TABLE, bits)}, WORDS)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_table_that_is_seen_in_one_layout_keeps_its_channels():
  def apply(v, x):
    table = v['table'].T
    return jnp.moveaxis(table[:, x], 0, -1).mean(1) @ table

  structure = transform.inspect(apply, TABLE, WORDS)
  assert structure.quantizers[1].channels == 10


def test_a_tied_embedding_in_flax_is_one_tensor():
  class Tied(nn.Module):
    @nn.compact
    def __call__(self, x):
      embed = nn.Embed(10, 4)
      return embed.attend(jnp.tanh(embed(x)).mean(1))

  variables = Tied().init(jax.random.key(0), WORDS)
  network = quick_quantize(Tied().apply, variables, WORDS)
  assert [q.is_weight for q in network.quantizers] == [False, True]
  assert network.costs.parameters == 40


@pytest.mark.parametrize(
  'apply',
  [
    lambda v, x: x @ v['table'].T + v['table'].sum(1),
    lambda v, x: x @ v['table'].T / jnp.linalg.norm(v['table'], axis=1),
    lambda v, x: (x * v['table'][0]) @ v['table'].T,
    lambda v, x: (
      jax.lax.fori_loop(0, 2, lambda i, y: y + v['table'][i], x) @ v['table'].T
    ),
  ],
  ids=['sum', 'norm', 'row', 'loop'],
)
def test_other_uses_of_a_weight_see_the_quantized_one(apply):
  network = quick_quantize(apply, TABLE, IMAGES)
  assert network.costs.parameters == 40
  found = network.apply(TABLE, IMAGES, np.asarray([32, 3]))
  expected = apply({'table': held(network, TABLE, 3)}, IMAGES)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_table_that_is_only_looked_up_stays_in_float():
  variables = TABLE | {'w': normal(3, 4, 3)}
  apply = lambda v, x: v['table'][x] @ v['w']
  network = quick_quantize(apply, variables, WORDS)
  assert [q.name for q in network.quantizers] == ['w:input', 'w']
  size = costs.model_size(network.costs, [2, 2])
  assert size == 12 * 2 + 32 * (3 + 2) + 40 * 32


def test_a_weight_that_is_returned_is_stored_in_float_beside():
  apply = lambda v, x: (x @ v['table'].T, v['table'])
  network = quick_quantize(apply, TABLE, IMAGES)
  size = costs.model_size(network.costs, [2, 2])
  assert size == 40 * 2 + 32 * (10 + 2) + 40 * 32


def test_gradients_reach_a_tied_table_by_both_uses():
  apply = lambda v, x: v['table'][x].mean(1) @ v['table'].T
  network = quick_quantize(apply, TABLE, WORDS)
  bits = np.asarray([32, 8])
  loss = lambda of: lambda v: (of(v) ** 2).sum()
  found = jax.grad(loss(lambda v: network.apply(v, WORDS, bits)))(TABLE)
  expected = jax.grad(loss(lambda v: apply(v, WORDS)))(TABLE)
  scale = float(jnp.abs(expected['table']).max())
  np.testing.assert_allclose(
    found['table'], expected['table'], atol=0.05 * scale
  )


# Captured arrays.


@pytest.mark.parametrize('as_array', [jnp.asarray, np.asarray])
@pytest.mark.parametrize(
  'apply',
  [
    lambda v, x: x @ v['w'] + v['b'],
    lambda v, x: (x * v['scale']) @ v['w'] + v['b'],
    lambda v, x: x @ v['w'] @ v['square'] + v['b'],
    lambda v, x: x @ (v['w'] / jnp.linalg.norm(v['w'])) + v['b'],
    lambda v, x: jax.jit(lambda x: x @ v['w'])(x) + jnp.asarray(v['b'])[0],
    lambda v, x: x @ v['w'] + v['ids'],
  ],
  ids=['bias', 'scale', 'two', 'normed', 'part', 'whole numbers'],
)
def test_captured_arrays_count_as_if_they_were_variables(apply, as_array):
  variables = {
    'w': normal(1, 4, 3),
    'b': normal(2, 3),
    'scale': normal(3, 4),
    'square': normal(4, 3, 3),
    'ids': jnp.arange(3),
  }
  captured = jax.tree.map(as_array, variables)
  given = transform.inspect(apply, variables, IMAGES)
  closed = transform.inspect(lambda v, x: apply(captured, x), {}, IMAGES)
  bits = np.full(len(given.quantizers), 5)
  assert costs.model_size(closed.costs, bits) == costs.model_size(
    given.costs, bits
  )
  assert closed.costs.parameters == given.costs.parameters


def test_numbers_in_a_function_are_not_stored():
  apply = lambda v, x: (2.5 * x + np.float32(1)) @ v['w'] / 3
  structure = transform.inspect(apply, {'w': normal(1, 4, 3)}, IMAGES)
  assert costs.model_size(structure.costs, [8, 8]) == 96 + 32 * (3 + 2)


def test_of_a_stack_of_weights_the_ones_that_are_read_count():
  variables = {'w': normal(1, 3, 4, 4), 'b': normal(2, 5, 4)}
  apply = lambda v, x: x @ v['w'][0] + v['b'][1] + v['b'][1] + v['w'][2, 3]
  structure = transform.inspect(apply, variables, IMAGES)
  size = costs.model_size(structure.costs, [8, 8])
  assert size == 16 * 8 + 32 * (4 + 2) + 32 * (4 + 4)


def test_complex_variables_count_as_two_numbers():
  variables = {'w': normal(1, 4, 3), 'c': normal(2, 4) + 1j}
  apply = lambda v, x: jnp.abs(x * v['c']) @ v['w']
  structure = transform.inspect(apply, variables, IMAGES)
  assert structure.costs.parameters == 12 + 2 * 4


def test_weights_kept_as_codes_and_made_floats_are_one_tensor_at_its_bits():
  variables = {'codes': jnp.ones((4, 3), jnp.int8), 'scale': normal(1, 3)}
  apply = lambda v, x: x @ (v['codes'].astype(jnp.float32) * v['scale'])
  structure = transform.inspect(apply, variables, IMAGES)
  size = costs.model_size(structure.costs, [4, 4])
  assert size == 12 * 4 + 32 * (3 + 2)


def test_weights_that_are_computed_at_every_use_are_one_tensor():
  class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
      cell = nn.OptimizedLSTMCell(4)
      carry = cell.initialize_carry(jax.random.key(0), x[:, 0].shape)
      for step in range(x.shape[1]):
        carry, y = cell(carry, x[:, step])
      return nn.Dense(3)(y)

  model = Recurrent()
  variables = model.init(jax.random.key(0), IMAGES)
  sizes = []
  for steps in (2, 3, 5):
    found = transform.inspect(model.apply, variables, IMAGES[:, :steps])
    bits = np.full(len(found.quantizers), 8)
    weights = [q for q in found.quantizers if q.is_weight]
    activations = len(bits) - len(weights)
    sizes.append(costs.model_size(found.costs, bits) - 64 * activations)
    assert len(weights) == 3
    assert found.costs.parameters == 159
  assert len(set(sizes)) == 1


@pytest.mark.parametrize('as_array', [jnp.asarray, np.asarray])
def test_a_jitted_function_has_captured_its_arrays_once(as_array):
  square, table = as_array(normal(1, 4, 4)), as_array(normal(2, 5, 4))
  layer = jax.jit(lambda x: jnp.tanh(x @ square) + table)
  apply = lambda v, x: layer(layer(x)) * table @ v['w']
  structure = transform.inspect(apply, {'w': normal(3, 4, 3)}, IMAGES)
  names = [q.name for q in structure.quantizers]
  assert names == [
    'constant:input',
    'constant',
    'constant#2:input',
    'w:input',
    'w',
  ]
  assert structure.costs.parameters == 16 + 20 + 12
