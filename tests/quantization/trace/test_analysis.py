"""Which tensor a quantizer is for: weights in layouts, activations in views."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemo_jax.quantization import transform
from tests.quantization.networks import (
  IMAGES,
  assert_float_beyond_16_bits,
  conv,
  edges,
  names,
  normal,
  operands,
  quick_quantize,
  uniform,
)

# Weights.


def test_a_tied_weight_in_two_layouts_has_one_scale(attention):
  quantized = attention[-1]
  index = names(quantized).index('embed')
  assert quantized.quantizers[index].channel_axes == ()
  assert quantized.bank.ranges[index].scale[0].size == 1
  assert quantized.costs.elements[index] == 24


def test_a_weight_used_twice_alike_has_one_quantizer_and_its_channels():
  images = normal(0, 4, 5)
  variables = {'layer': {'kernel': normal(1, 5, 5), 'bias': normal(2, 5)}}

  def apply(v, x):
    for _ in range(2):
      x = jax.nn.relu(x @ v['layer']['kernel'] + v['layer']['bias'])
    return x

  quantized = quick_quantize(apply, variables, images)
  assert operands(quantized) == [
    ('layer', ['layer:input', 'layer/kernel']),
    ('layer#2', ['layer#2:input', 'layer/kernel']),
  ]
  assert quantized.quantizers[1].channel_axes == (1,)
  # Kept are the bias and: 5 scales and 2, and a zero point each of the two.
  assert quantized.costs.overhead_bits == 32 * (5 + 5 + 2 + 2)


@pytest.mark.parametrize('scheme', ['symmetric', 'asymmetric'])
def test_a_tied_weight_may_have_two_ranks(scheme):
  variables = {'kernel': normal(1, 2, 2, 3, 4)}

  def apply(v, x):
    patches = x[:, :2, :2].reshape(len(x), 12)
    return conv(x, v['kernel']), patches @ v['kernel'].reshape(12, 4)

  images = normal(0, 4, 5, 5, 3)
  quantized = quick_quantize(apply, variables, images, weight_scheme=scheme)
  assert names(quantized) == ['kernel:input', 'kernel']
  assert quantized.bank.ranges[1].scale[0].size == 1
  run = jax.jit(quantized.apply)
  first, second = run(variables, images, uniform(quantized, 8))
  # The patch that the second layer sees is the first position of the first.
  np.testing.assert_allclose(second, first[:, 0, 0], rtol=1e-5)


def test_a_weight_for_each_head_has_a_scale_for_each_of_their_channels():
  variables = {'heads': normal(1, 4, 5, 3)}
  apply = lambda v, x: jnp.einsum('bthd,hde->bthe', x, v['heads'])
  quantized = quick_quantize(apply, variables, normal(0, 2, 6, 4, 5))
  assert quantized.quantizers[1].channel_axes == (0, 2)
  assert quantized.bank.ranges[1].scale.shape[1:] == (4, 1, 3)
  assert quantized.operations[0].macs == 6 * 4 * 5 * 3


def test_a_layout_is_told_from_another_of_the_same_shape():
  variables = {'kernel': normal(1, 4, 4)}
  apply = lambda v, x: (x @ v['kernel']) @ v['kernel'].T
  quantized = quick_quantize(apply, variables, normal(0, 3, 4))
  assert quantized.quantizers[1].channel_axes == ()


def test_weights_are_reached_in_calls_and_custom_derivatives():
  captured = normal(9, 5, 5)

  @jax.custom_jvp
  def jvp_layer(x, w):
    return x @ w

  jvp_layer.defjvp(lambda p, t: (p[0] @ p[1], t[0] @ p[1] + p[0] @ t[1]))

  @jax.custom_vjp
  def vjp_layer(x, w):
    return x @ w

  vjp_layer.defvjp(
    lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g)
  )

  def apply(v, x):
    x = jax.nn.relu(jvp_layer(x, v['jvp']['w']))
    x = jax.nn.silu(vjp_layer(x, v['vjp']['w']))
    x = jax.nn.gelu(jax.jit(jax.jit(lambda x: x @ v['jit']['w']))(x))
    x = jax.nn.softplus(jax.checkpoint(jnp.dot)(x, v['remat']['w']))
    x = jax.vmap(lambda row: v['vmap']['w'].T @ row)(x)
    return jnp.tanh(x) @ captured

  inside = ['jvp', 'vjp', 'jit', 'remat', 'vmap']
  variables = {n: {'w': normal(i, 5, 5)} for i, n in enumerate(inside)}
  images = normal(0, 4, 5)
  quantized = quick_quantize(apply, variables, images)
  assert operands(quantized) == [
    *((n, [f'{n}:input', f'{n}/w']) for n in inside),
    ('constant', ['constant:input', 'constant']),
  ]
  assert quantized.costs.parameters == 6 * 25
  assert_float_beyond_16_bits(quantized, apply, variables, images)
  loss = lambda v: quantized.apply(v, images, uniform(quantized, 8)).sum()
  for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(variables)):
    assert np.isfinite(leaf).all()
    assert np.any(leaf)


def test_a_weight_computed_from_variables_goes_by_the_largest():
  variables = {'layer': {'direction': normal(1, 5, 3), 'gain': normal(2, 3)}}

  def apply(v, x):
    w = v['layer']['direction']
    return x @ (w / jnp.linalg.norm(w, axis=0) * v['layer']['gain'])

  quantized = quick_quantize(apply, variables, normal(0, 4, 5))
  assert names(quantized) == ['layer:input', 'layer/direction']
  assert quantized.costs.parameters == 15


@pytest.mark.parametrize(
  'derive',
  [
    lambda w: w * 0.5,
    lambda w: (w - w.mean()) / w.std(),
    lambda w: jnp.concatenate([w[:2], w[2:]]),
    lambda w: w.astype(jnp.bfloat16).astype(jnp.float32),
    lambda w: w[1:, 1:][:2, :2].repeat(2, 0).repeat(2, 1),
  ],
  ids=['scaled', 'standardised', 'joined', 'rounded', 'repeated'],
)
def test_a_derived_weight_that_is_used_twice_is_one_tensor(derive):
  apply = lambda v, x: jnp.tanh(x @ derive(v['s'])) @ derive(v['s'])
  structure = transform.inspect(apply, {'s': normal(1, 4, 4)}, IMAGES)
  assert [q.is_weight for q in structure.quantizers] == [False, True, False]


# Tensors that several operations consume.


def two_layers(view):
  """Two dense layers on relu(x), the second on a view of it."""

  def apply(v, x):
    x = jax.nn.relu(x)
    seen = view(x)
    return x @ v['a'], seen @ v['b'][: seen.shape[-1]]

  return apply


def pad_lax(x):
  return jax.lax.pad(x, 0.0, [(0, 0, 0), (1, 1, 0), (1, 1, 0), (0, 0, 0)])


VIEW_IMAGES = normal(0, 3, 4, 4, 3)
SIDES = (0, 0), (1, 1), (1, 1), (0, 0)
VIEWS = {
  'itself': lambda x: x,
  'reshape': lambda x: x.reshape(len(x), -1, 3),
  'transpose': lambda x: x.transpose(0, 3, 2, 1),
  'flip': lambda x: x[:, ::-1],
  'slice': lambda x: x[:, 1:3],
  'strides': lambda x: x[:, ::2, ::2],
  'squeeze': lambda x: x[:, 0],
  'expand': lambda x: x[:, None],
  'broadcast': lambda x: jnp.broadcast_to(x[:, :1], x.shape),
  'max pool': lambda x: nn.max_pool(x, (2, 2), (2, 2)),
  'overlapping max pool': lambda x: nn.max_pool(x, (3, 3), padding='SAME'),
  'zero pad': pad_lax,
  'zero pad by jnp': lambda x: jnp.pad(x, 1)[1:-1, ..., 1:-1],
  'several': lambda x: nn.max_pool(pad_lax(x), (2, 2)).reshape(len(x), -1),
}


@pytest.mark.parametrize('view', VIEWS)
def test_a_tensor_in_two_views_has_one_quantizer(view):
  variables, images = {'a': normal(1, 3, 2), 'b': normal(2, 96, 2)}, VIEW_IMAGES
  quantized = transform.inspect(two_layers(VIEWS[view]), variables, images)
  assert names(quantized) == ['a:input', 'a', 'b']
  assert operands(quantized)[1] == ('b', ['a:input', 'b'])


NO_VIEWS = {
  'scaled': lambda x: 2 * x,
  'pad with one': lambda x: jnp.pad(x, SIDES, constant_values=1.0),
  'average pool': lambda x: nn.avg_pool(x, (2, 2)),
  'sum': lambda x: x.sum(1),
  'clip': lambda x: jnp.clip(x, 0, 1),
}


@pytest.mark.parametrize('view', NO_VIEWS)
def test_a_tensor_of_other_values_has_its_own_quantizer(view):
  variables, images = {'a': normal(1, 3, 2), 'b': normal(2, 3, 2)}, VIEW_IMAGES
  quantized = transform.inspect(two_layers(NO_VIEWS[view]), variables, images)
  assert names(quantized) == ['a:input', 'a', 'b:input', 'b']


@pytest.mark.parametrize('case', ['slices', 'max pool first'])
def test_a_range_covers_what_every_consumer_sees(case):
  variables = {'a': normal(1, 4, 2), 'b': normal(2, 4, 2)}
  images = normal(0, 4, 4, 4, 8) * jnp.asarray([1.0] * 4 + [50.0] * 4)

  def slices(v, x):
    return x[..., :4] @ v['a'], x[..., 4:] @ v['b']

  def max_pool_first(v, x):
    x = x[..., 4:]
    pooled = nn.max_pool(x, (4, 4), (4, 4))
    return pooled @ v['a'], x @ v['b']

  apply = slices if case == 'slices' else max_pool_first
  quantized = quick_quantize(apply, variables, images)
  actual = quantized.apply(variables, images, uniform(quantized, 16))
  expected = apply(variables, images)
  assert len(quantized.quantizers) == 3
  for a, b in zip(actual, expected, strict=True):
    np.testing.assert_allclose(a, b, atol=0.01 * np.abs(b).max())


def test_two_convolutions_and_a_matmul_of_one_tensor_share_its_quantizer():
  variables = {
    'a': normal(1, 3, 3, 3, 4),
    'b': normal(2, 1, 1, 3, 4),
    'c': normal(3, 48, 2),
  }

  def apply(v, x):
    x = jax.nn.relu(x)
    return conv(x, v['a']) + conv(x, v['b']), x.reshape(len(x), -1) @ v['c']

  quantized = quick_quantize(apply, variables, VIEW_IMAGES)
  assert operands(quantized) == [
    ('a', ['a:input', 'a']),
    ('b', ['a:input', 'b']),
    ('c', ['a:input', 'c']),
  ]
  assert edges(quantized.structure.data_flow_graph) == [(0, 1), (0, 2), (0, 3)]
