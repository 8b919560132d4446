"""Which products are layers, which are none, and which are refused."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nemo_jax
from nemo_jax import InputError
from nemo_jax.quantization import transform
from tests.quantization.networks import (
  IMAGES,
  WEIGHT,
  WORDS,
  names,
  normal,
  quick_quantize,
)

# Products that are multiplications.


@pytest.mark.parametrize(
  'multiply',
  [
    lambda x, f: jnp.einsum('bt,k->btk', x[..., 0], f),
    lambda x, f: jnp.einsum('btk,k->btk', x, f),
    lambda x, f: jnp.einsum('btk,bt->btk', x, x[..., 0]),
    lambda x, f: jnp.einsum('btk,b->btk', x, x[:, 0, 0]),
    lambda x, f: jax.vmap(jnp.outer)(x[..., 0], x[:, 0]),
    lambda x, f: x[..., :1] @ x[:, :1],
    lambda x, f: jax.lax.dot_general(x, f, (((), ()), ((), ())))[..., 0],
    jax.jit(lambda x, f: jnp.einsum('bt,k->btk', x[..., 0], f)),
  ],
  ids=[
    'outer',
    'by channel',
    'by position',
    'by example',
    'vmapped outer',
    'over one index',
    'no axes at all',
    'in jit',
  ],
)
def test_products_without_a_sum_are_no_layers(multiply):
  apply = lambda v, x: jnp.sin(multiply(x, v['f'])) @ v['w']
  variables = WEIGHT | {'f': normal(2, 4)}
  quantized = nemo_jax.quantize(apply, variables, IMAGES)
  assert names(quantized) == ['w:input', 'w']
  assert not quantized.fixed
  bits = np.full(2, 32)
  expected = apply(variables, IMAGES)
  found = quantized.apply(variables, IMAGES, bits)
  np.testing.assert_array_equal(found, expected)


def test_a_dense_layer_of_one_feature_is_a_layer():
  apply = lambda v, x: x[..., :1] @ v['w'][:1]
  structure = transform.inspect(apply, WEIGHT, IMAGES)
  assert names(structure) == ['w:input', 'w']


def test_head_masks_and_rotary_positions_stay_in_float():
  class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
      angles = jnp.einsum('bt,k->btk', 40 * x[..., 0], jnp.arange(2.0))
      x = x * jnp.sin(jnp.repeat(angles, 2, axis=-1))
      scores = jnp.einsum('bqd,bkd->bqk', x, x)
      masked = jnp.einsum('bqk,b->bqk', scores, x[:, 0, 0])
      return nn.Dense(3)(masked)

  model = Attention()
  variables = model.init(jax.random.key(0), IMAGES)
  quantized = nemo_jax.quantize(model.apply, variables, IMAGES)
  assert [op.kind for op in quantized.operations] == ['matmul', 'dense']
  eight = quantized.apply(variables, IMAGES, np.full(len(names(quantized)), 16))
  expected = model.apply(variables, IMAGES)
  scale = float(jnp.abs(expected).max())
  np.testing.assert_allclose(eight, expected, atol=1e-3 * scale)


# What images are resampled with.


@pytest.mark.parametrize('method', ['linear', 'cubic', 'lanczos3', 'nearest'])
@pytest.mark.parametrize('size', [(16, 16), (5, 11), (8, 3)])
def test_resampling_is_no_layer(method, size):
  images = normal(0, 3, 8, 8, 3)
  variables = {'w': normal(1, 3, 4)}

  def apply(v, x):
    x = jax.image.resize(x, (len(x), *size, 3), method)
    return x.mean((1, 2)) @ v['w']

  network = quick_quantize(apply, variables, images)
  assert [q.name for q in network.quantizers] == ['w:input', 'w']
  assert network.costs.parameters == 12
  assert network.costs.macs.sum() == 12
  products = sum(a != b for a, b in zip(size, (8, 8), strict=True))
  assert len(network.fixed) == (0 if method == 'nearest' else products)
  found = network.apply(variables, images, np.full(2, 32))
  np.testing.assert_allclose(found, apply(variables, images), rtol=1e-5)


@pytest.mark.parametrize(
  'matrix',
  [
    lambda: jnp.eye(4),
    lambda: jnp.tril(jnp.ones((4, 4))),
    lambda: jnp.cos(jnp.outer(jnp.arange(4.0), jnp.arange(4.0))),
    lambda: jnp.ones((4, 4)) * jnp.asarray([1.0, 2.0, 3.0, 4.0]),
  ],
  ids=['eye', 'sums', 'cosines', 'from fewer numbers'],
)
def test_products_with_what_is_computed_are_named_and_no_layers(matrix):
  apply = lambda v, x: x @ matrix() @ v['w']
  structure = transform.inspect(apply, {'w': normal(1, 4, 3)}, IMAGES)
  assert [op.name for op in structure.operations] == ['w']
  assert structure.fixed == ('dot_general [2, 5, 4] [4, 4]',)


def test_a_captured_matrix_is_a_layer():
  matrix = normal(5, 4, 4)
  apply = lambda v, x: x @ matrix @ v['w']
  structure = transform.inspect(apply, {'w': normal(1, 4, 3)}, IMAGES)
  assert [op.name for op in structure.operations] == ['constant', 'w']


# Products of other numbers.


@pytest.mark.parametrize(
  ('apply', 'words'),
  [
    (lambda v, x: jnp.abs(x @ v['c']), 'complex numbers'),
    (lambda v, x: jnp.abs((x + 0j) @ (x + 1j).mT), 'complex numbers'),
    (lambda v, x: jnp.fft.fft(x) @ v['c'], 'complex numbers'),
    (
      lambda v, x: jnp.round(x).astype(jnp.int8) @ v['i'],
      'product with i is one of int8; give the network in floating point',
    ),
    (
      lambda v, x: jax.lax.dot_general(
        jnp.round(x).astype(jnp.int8),
        v['i'],
        (((2,), (0,)), ((), ())),
        preferred_element_type=jnp.float32,
      ),
      'product with i is one of int8',
    ),
  ],
  ids=['weight', 'images', 'fft', 'whole numbers', 'summed in float'],
)
def test_products_of_numbers_that_no_quantizer_is_for_are_refused(apply, words):
  variables = {
    'w': normal(1, 4, 3),
    'c': normal(2, 4, 3) + 1j,
    'i': jnp.ones((4, 3), jnp.int8),
  }
  with pytest.raises(InputError, match=words) as raised:
    transform.inspect(apply, variables, IMAGES)
  assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
  'apply',
  [
    lambda v, x: v['t'][(x + v['t'].argmax(0)[0]) % 10].mean(1) @ v['w'],
    lambda v, x: v['t'][(x + (x * x)) % 10].mean(1) @ v['w'],
    lambda v, x: v['t'][x].mean(1) @ v['w'] + (x > 3).sum(1)[:, None],
    lambda v, x: jnp.fft.fft(v['t'][x] @ v['s']).sum(1).real @ v['w'],
    lambda v, x: (
      (jnp.fft.fft(v['t'][x]) + v['t'][x] @ v['s']).real[:, 0] @ v['w']
    ),
  ],
  ids=['indices', 'two indices', 'counts', 'complex pool', 'complex add'],
)
def test_sums_of_whole_and_complex_numbers_are_not_quantized(apply):
  variables = {
    't': normal(1, 10, 4),
    's': normal(2, 4, 4),
    'w': normal(3, 4, 3),
  }
  network = quick_quantize(apply, variables, WORDS, extra_ops=('add', 'pool'))
  assert not [op for op in network.operations if op.kind == 'add']
  low = np.full(len(network.quantizers), 2)
  assert np.isfinite(network.apply(variables, WORDS, low)).all()
