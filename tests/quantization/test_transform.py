"""`quantize` on networks that the package never saw."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nemo_jax
from nemo_jax.core.types import InputError
from nemo_jax.quantization.numerics import ranges as ranges_lib
from nemo_jax.quantization.numerics import widths as widths_lib
from nemo_jax.quantization.numerics.bank import Bank
from nemo_jax.quantization.trace import analysis
from nemo_jax.quantization.trace import program as program_lib

NHWC = ('NHWC', 'HWIO', 'NHWC')
# Structure does not depend on the ranges; these are the quickest to find.
structure = functools.partial(nemo_jax.quantize, calibration='min_max')


def normal(seed, *shape, scale=1.0):
  draw = np.random.default_rng(seed).normal(size=shape) * scale
  return jnp.asarray(draw, jnp.float32)


def filled(shapes):
  """Variables of the shapes, in which norms and biases do something too."""

  def fill(i, x):
    if jnp.issubdtype(x.dtype, jnp.floating):
      values = normal(i, *x.shape, scale=0.4)
      return jnp.abs(values) + 0.2 if x.ndim == 1 else values
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return jax.random.key(0) if is_key else jnp.zeros(x.shape, x.dtype)

  leaves, treedef = jax.tree.flatten(shapes)
  return jax.tree.unflatten(treedef, [fill(i, x) for i, x in enumerate(leaves)])


def conv(x, kernel, stride=1, groups=1, padding='SAME'):
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    padding,
    dimension_numbers=NHWC,
    feature_group_count=groups,
  )


def test_an_accelerator_runs_no_product_of_eight_bit_codes_in_float32(digits):
  quantized = structure(
    digits.apply,
    digits.variables,
    digits.calibration.images[:32],
    lowering='backend',
  )
  images = digits.search.images[:4]

  @jax.jit
  def run(images, bits):
    return quantized.apply(digits.variables, images, bits, max_bits=8)

  kinds = [operation.kind for operation in quantized.operations]
  # A GPU sums depthwise products outside of its matrix units.
  counts = {'cuda': 10 - kinds.count('depthwise'), 'tpu': 10}
  for platform, count in counts.items():
    traced = run.trace(images, jnp.full(20, 8))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    words = ('stablehlo.convolution', 'stablehlo.dot_general')
    products = [
      line for line in text.splitlines() if any(word in line for word in words)
    ]
    assert len(products) == count
    for line in products:
      assert line.rsplit(' : ', 1)[1].split(' -> ')[0].count('xbf16') == 2


def names(quantized):
  return [q.name for q in quantized.quantizers]


def weights(quantized):
  return [q.name for q in quantized.quantizers if q.is_weight]


def operands(quantized):
  """What each operation consumes: its name, and those of its quantizers."""
  known = names(quantized)
  return [
    (op.name, [known[i] for i in op.operands]) for op in quantized.operations
  ]


def edges(graph):
  return list(
    zip(graph.senders.tolist(), graph.receivers.tolist(), strict=True)
  )


def analyzed(apply, variables, images, extra_ops=()):
  """The structure alone, no ranges."""
  traced = jax.make_jaxpr(apply)(variables, images)
  program = program_lib.flatten(traced)
  paths = jax.tree_util.tree_leaves_with_path(variables)
  leaves = [jax.tree_util.keystr(p, simple=True) for p, _ in paths]
  return analysis.analyze(program, leaves, len(images), also)


def uniform(quantized, bits):
  return jnp.full(len(quantized.quantizers), bits, jnp.int32)


def assert_float_beyond_16_bits(quantized, apply, variables, images):
  expected = jax.jit(apply)(variables, images)
  run = jax.jit(quantized.apply)
  for bits in (17, 32):
    actual = run(variables, images, uniform(quantized, bits))
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    leaves = jax.tree.leaves(actual), jax.tree.leaves(expected)
    for a, b in zip(*leaves, strict=True):
      assert a.dtype == b.dtype
      np.testing.assert_allclose(a, b, 1e-6, 1e-6 * np.abs(b).max())


STACK = {'w': normal(1, 3, 4, 4)}
ROWS = normal(0, 5, 4)


def dense(v, x):
  return x @ v['w'][0]


# A Flax linen network.


class LinenNet(nn.Module):
  """One of each kind of layer."""

  @nn.compact
  def __call__(self, x):
    """Logits [B, 5] of images [B, 8, 8, 3]."""
    norm = functools.partial(nn.BatchNorm, use_running_average=True)
    x = nn.Conv(8, (3, 3), strides=2, use_bias=False, name='stem')(x)
    x = nn.swish(norm()(x))
    y = nn.Conv(8, (3, 3), feature_group_count=8, name='depthwise')(x)
    y = nn.gelu(norm()(y))
    y = nn.remat(nn.Conv)(8, (1, 1), name='project')(y)
    x = nn.relu(x + y)
    x = nn.max_pool(x, (2, 2), strides=(2, 2))
    x = nn.Conv(6, (2, 2), feature_group_count=2, name='grouped')(x)
    x = nn.avg_pool(nn.relu(x), (2, 2))
    return nn.Dense(5, name='head')(x.reshape(len(x), -1))


@pytest.fixture(scope='module')
def linen():
  """(apply, variables, images, quantized)."""
  model, images = LinenNet(), normal(0, 6, 8, 8, 3)
  variables = filled(jax.eval_shape(model.init, jax.random.key(0), images))
  return (
    model.apply,
    variables,
    images,
    structure(model.apply, variables, images),
  )


def test_linen_quantizers_are_the_operands_of_its_layers(linen):
  assert names(linen[-1]) == [
    'stem:input',
    'stem/kernel',
    'depthwise:input',
    'depthwise/kernel',
    'project:input',
    'project/kernel',
    'grouped:input',
    'grouped/kernel',
    'head:input',
    'head/kernel',
  ]
  assert weights(linen[-1]) == names(linen[-1])[1::2]


def test_linen_kinds_and_macs_are_those_counted_by_hand(linen):
  operations = linen[-1].operations
  assert [(op.name, op.kind, op.macs) for op in operations] == [
    ('stem', 'conv', 4 * 4 * 8 * 3 * 3 * 3),
    ('depthwise', 'depthwise', 4 * 4 * 8 * 3 * 3),
    ('project', 'pointwise', 4 * 4 * 8 * 8),
    ('grouped', 'grouped', 2 * 2 * 6 * 2 * 2 * 4),
    ('head', 'dense', 6 * 5),
  ]


def test_linen_shapes_are_those_of_its_layers(linen):
  facts = [
    (op.in_channels, op.out_channels, op.positions, op.kernel, op.stride)
    for op in linen[-1].operations
  ]
  assert facts == [
    (3, 8, 16, 9, 2),
    (8, 8, 16, 9, 1),
    (8, 8, 16, 1, 1),
    (8, 6, 4, 4, 1),
    (6, 5, 1, 1, 1),
  ]
  sizes = [q.elements for q in linen[-1].quantizers]
  assert sizes == [192, 216, 128, 72, 128, 64, 128, 96, 6, 30]


def test_linen_channels_are_the_outputs_of_its_layers(linen):
  quantized = linen[-1]
  axes = [q.channel_axes for q in quantized.quantizers]
  assert axes == [(), (3,), (), (3,), (), (3,), (), (3,), (), (1,)]
  shapes = [table.scale.shape[1:] for table in quantized.bank.ranges[1::2]]
  assert shapes == [
    (1, 1, 1, 8),
    (1, 1, 1, 8),
    (1, 1, 1, 8),
    (1, 1, 1, 6),
    (1, 5),
  ]
  assert {table.scale.shape for table in quantized.bank.ranges[::2]} == {(15,)}


def test_linen_data_flow_is_that_of_a_residual_block(linen):
  assert edges(linen[-1].data_flow_graph) == [
    (0, 1),
    (1, 2),
    (1, 6),  # around the block
    (2, 3),
    (3, 4),
    (4, 5),
    (5, 6),
    (6, 7),
    (7, 8),
    (8, 9),
  ]


def test_linen_is_itself_beyond_16_bits(linen):
  assert_float_beyond_16_bits(linen[-1], *linen[:-1])


def test_additions_and_poolings_are_quantized_on_request(linen):
  apply, variables, images, plain = linen
  both = structure(apply, variables, images, extra_ops=('add', 'pool'))
  # Biases, norms and the x + c x^3 within gelu are no additions, and max
  # pooling makes no new values.
  assert operands(both) == [
    ('stem', ['stem:input', 'stem/kernel']),
    ('depthwise', ['depthwise:input', 'depthwise/kernel']),
    ('project', ['project:input', 'project/kernel']),
    ('add', ['depthwise:input', 'add:rhs']),
    ('grouped', ['grouped:input', 'grouped/kernel']),
    ('pool', ['pool:input']),
    ('head', ['head:input', 'head/kernel']),
  ]
  macs = [op.macs for op in both.operations if op.macs]
  assert macs == [op.macs for op in plain.operations]
  assert_float_beyond_16_bits(both, apply, variables, images)


@pytest.mark.parametrize('kind', ['add', 'pool'])
def test_one_of_additions_and_poolings_may_be_quantized_alone(linen, kind):
  apply, variables, images, plain = linen
  more = analyzed(apply, variables, images, extra_ops=(kind,))
  kinds = [op.kind for op in more.operations]
  assert sorted(kinds) == sorted([kind, *(op.kind for op in plain.operations)])
  assert len(more.quantizers) == len(plain.quantizers) + 1


def test_the_sequential_graph_is_a_chain_in_order_of_execution(linen):
  graph = linen[-1].sequential_graph
  assert edges(graph) == [(i, i + 1) for i in range(9)]
  assert graph.n_node.tolist() == [10]
  assert graph.n_edge.tolist() == [9]


def test_both_graphs_have_the_same_features_of_nodes(linen):
  chain, flow = linen[-1].sequential_graph, linen[-1].data_flow_graph
  np.testing.assert_array_equal(chain.nodes, flow.nodes)
  assert np.isfinite(chain.nodes).all()
  assert chain.nodes.min() >= 0
  assert chain.nodes.max() <= 1
  # No two quantizers look the same to a searcher.
  assert len(np.unique(chain.nodes, axis=0)) == len(chain.nodes)


# A Flax nnx network.


class NnxNet(nnx.Module):
  """A convolution, a norm, a list of layers, and dropout at rest."""

  def __init__(self, rngs):
    self.conv1 = nnx.Conv(3, 4, (3, 3), rngs=rngs)
    self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, deterministic=True, rngs=rngs)
    self.blocks = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])
    self.head = nnx.Linear(4, 5, rngs=rngs)

  def __call__(self, x):
    """Logits [B, 5] of images [B, 6, 6, 3]."""
    x = nnx.relu(self.norm(self.conv1(x)))
    x = self.dropout(jnp.mean(x, (1, 2)))
    for block in self.blocks:
      x = nnx.relu(block(x))
    return self.head(x)


@pytest.fixture(scope='module')
def merged():
  """(apply, variables, images, quantized)."""
  graphdef, shapes = nnx.split(nnx.eval_shape(lambda: NnxNet(nnx.Rngs(0))))
  images = normal(0, 6, 6, 6, 3)

  def apply(state, images):
    return nnx.merge(graphdef, state)(images)

  state = filled(shapes)
  return apply, state, images, structure(apply, state, images)


def test_nnx_quantizers_have_readable_names(merged):
  assert names(merged[-1]) == [
    'conv1:input',
    'conv1/kernel',
    'blocks/0:input',
    'blocks/0/kernel',
    'blocks/1:input',
    'blocks/1/kernel',
    'head:input',
    'head/kernel',
  ]
  assert weights(merged[-1]) == names(merged[-1])[1::2]


def test_nnx_kinds_and_macs_are_those_counted_by_hand(merged):
  assert [(op.name, op.kind, op.macs) for op in merged[-1].operations] == [
    ('conv1', 'conv', 6 * 6 * 4 * 27),
    ('blocks/0', 'dense', 16),
    ('blocks/1', 'dense', 16),
    ('head', 'dense', 20),
  ]


def test_nnx_keys_and_counts_are_no_parameters(merged):
  biases_and_norm = 4 + 4 + 4 + 5 + 4 * 4
  assert merged[-1].costs.parameters == 27 * 4 + 16 + 16 + 20 + biases_and_norm


def test_nnx_is_itself_beyond_16_bits(merged):
  assert_float_beyond_16_bits(merged[-1], *merged[:-1])


def test_on_a_chain_both_graphs_have_the_same_edges(merged):
  quantized = merged[-1]
  assert edges(quantized.structure.data_flow_graph) == edges(
    quantized.structure.sequential_graph
  )


# Plain JAX.


def attention_net(v, x):
  """Self-attention between an embedding and its transpose; x [B, T, 6]."""
  h = jnp.einsum('btc,cd->btd', x, v['embed'])
  q = jnp.einsum('btd,de->bte', h, v['query'])
  k = jnp.einsum('btd,de->bte', h, v['key'])
  scores = jnp.einsum('bqe,bke->bqk', q, k) / 2
  h = jnp.einsum('bqk,bkd->bqd', jax.nn.softmax(scores), h)
  return h @ v['embed'].T


@pytest.fixture(scope='module')
def attention():
  """(apply, variables, images, quantized)."""
  variables = {
    'embed': normal(1, 6, 4),
    'query': normal(2, 4, 3),
    'key': normal(3, 4, 3),
  }
  images = normal(0, 5, 7, 6)
  return (
    attention_net,
    variables,
    images,
    structure(attention_net, variables, images),
  )


def test_attention_multiplies_two_activations_with_a_quantizer_each(attention):
  assert operands(attention[-1]) == [
    ('embed', ['embed:input', 'embed']),
    ('query', ['query:input', 'query']),
    ('key', ['query:input', 'key']),
    ('matmul', ['matmul:lhs', 'matmul:rhs']),
    ('matmul#2', ['matmul#2:lhs', 'query:input']),
    ('embed#2', ['embed#2:input', 'embed']),
  ]
  assert weights(attention[-1]) == ['embed', 'query', 'key']


def test_attention_kinds_and_macs_are_those_counted_by_hand(attention):
  assert [(op.kind, op.macs) for op in attention[-1].operations] == [
    ('dense', 7 * 6 * 4),
    ('dense', 7 * 4 * 3),
    ('dense', 7 * 4 * 3),
    ('matmul', 7 * 7 * 3),
    ('matmul', 7 * 7 * 4),
    ('dense', 7 * 4 * 6),
  ]


def test_attention_is_itself_beyond_16_bits(attention):
  assert_float_beyond_16_bits(attention[-1], *attention[:-1])


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

  quantized = structure(apply, variables, images)
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
  quantized = structure(apply, variables, images, weight_scheme=scheme)
  assert names(quantized) == ['kernel:input', 'kernel']
  assert quantized.bank.ranges[1].scale[0].size == 1
  run = jax.jit(quantized.apply)
  first, second = run(variables, images, uniform(quantized, 8))
  # The patch that the second layer sees is the first position of the first.
  np.testing.assert_allclose(second, first[:, 0, 0], rtol=1e-5)


def test_a_weight_for_each_head_has_a_scale_for_each_of_their_channels():
  variables = {'heads': normal(1, 4, 5, 3)}
  apply = lambda v, x: jnp.einsum('bthd,hde->bthe', x, v['heads'])
  quantized = structure(apply, variables, normal(0, 2, 6, 4, 5))
  assert quantized.quantizers[1].channel_axes == (0, 2)
  assert quantized.bank.ranges[1].scale.shape[1:] == (4, 1, 3)
  assert quantized.operations[0].macs == 6 * 4 * 5 * 3


def test_a_layout_is_told_from_another_of_the_same_shape():
  variables = {'kernel': normal(1, 4, 4)}
  apply = lambda v, x: (x @ v['kernel']) @ v['kernel'].T
  quantized = structure(apply, variables, normal(0, 3, 4))
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
  quantized = structure(apply, variables, images)
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

  quantized = structure(apply, variables, normal(0, 4, 5))
  assert names(quantized) == ['layer:input', 'layer/direction']
  assert quantized.costs.parameters == 15


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
  'zero pad by jnp': lambda x: jnp.pad(x, 1)[..., 1:-1],
  'several': lambda x: nn.max_pool(pad_lax(x), (2, 2)).reshape(len(x), -1),
}


@pytest.mark.parametrize('view', VIEWS)
def test_a_tensor_in_two_views_has_one_quantizer(view):
  variables, images = {'a': normal(1, 3, 2), 'b': normal(2, 96, 2)}, VIEW_IMAGES
  quantized = analyzed(two_layers(VIEWS[view]), variables, images)
  assert names(quantized) == ['a:input', 'a', 'b']
  assert operands(quantized)[1] == ('b', ['a:input', 'b'])


NO_VIEWS = {
  'scaled': lambda x: 2 * x,
  'pad with one': lambda x: jnp.pad(x, 1, constant_values=1.0)[..., 1:-1],
  'average pool': lambda x: nn.avg_pool(x, (2, 2)),
  'sum': lambda x: x.sum(1),
  'clip': lambda x: jnp.clip(x, 0, 1),
}


@pytest.mark.parametrize('view', NO_VIEWS)
def test_a_tensor_of_other_values_has_its_own_quantizer(view):
  variables, images = {'a': normal(1, 3, 2), 'b': normal(2, 3, 2)}, VIEW_IMAGES
  quantized = analyzed(two_layers(NO_VIEWS[view]), variables, images)
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
  quantized = structure(apply, variables, images)
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

  quantized = structure(apply, variables, VIEW_IMAGES)
  assert operands(quantized) == [
    ('a', ['a:input', 'a']),
    ('b', ['a:input', 'b']),
    ('c', ['a:input', 'c']),
  ]
  assert edges(quantized.structure.data_flow_graph) == [(0, 1), (0, 2), (0, 3)]


# The whole network in integers.


def residual_net(v, x):
  """Logits [B, 5] of images [B, 7, 7, 3]."""
  x = jax.nn.relu(conv(x, v['stem']['w'], stride=2) + v['stem']['b'])
  y = conv(x, v['depthwise']['w'], groups=4) + v['depthwise']['b']
  y = conv(jax.nn.relu(y), v['project']['w']) + v['project']['b']
  x = jnp.mean(jax.nn.relu(x + y), (1, 2))
  return x @ v['head']['w'] + v['head']['b']


def on_grid(x, bits):
  """The nearest multiples of 2^-bits."""
  return jnp.round(x * 2**bits) / 2**bits


@pytest.fixture(scope='module')
def residual():
  """(apply, variables, images, quantized)."""
  shapes = {
    'stem': (3, 3, 3, 4),
    'depthwise': (3, 3, 1, 4),
    'project': (1, 1, 4, 4),
    'head': (4, 5),
  }
  variables = {
    name: {
      'w': normal(i, *shape, scale=0.4),
      'b': on_grid(normal(i + 10, shape[-1], scale=0.2), 8),
    }
    for i, (name, shape) in enumerate(shapes.items())
  }
  images = on_grid(normal(0, 6, 7, 7, 3, scale=0.7), 6)
  quantized = nemo_jax.quantize(residual_net, variables, images)
  return residual_net, variables, images, quantized


@pytest.fixture(scope='module')
def exact_ranges(residual):
  """Ranges with powers of two for scales, whose arithmetic float32 has exactly.

  The steps of activations are 2^(2-b), those of weights 2^(1-b) or half of it,
  by channel.
  """
  widths = 2.0 ** np.asarray(widths_lib.WIDTHS, np.float32)
  ranges, quantized = [], residual[-1]
  for quantizer, table in zip(
    quantized.quantizers, quantized.bank.ranges, strict=True
  ):
    column = widths.reshape(-1, *[1] * (table.scale.ndim - 1))
    if quantizer.is_weight:
      halves = 2.0 ** -(np.arange(table.scale.shape[-1]) % 2)
      scale, zero_point = 2 / column * halves, column / 2
    else:
      signed = quantizer.name in ('stem:input', 'head:input')
      scale, zero_point = 4 / column, column / 4 * signed
    zero_point = np.broadcast_to(zero_point, scale.shape)
    ranges.append(
      ranges_lib.Range(
        jnp.asarray(scale, jnp.float32), jnp.asarray(zero_point, jnp.float32)
      )
    )
  return tuple(ranges)


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


WIDTHS_TRIED = [*([b] * 8 for b in (2, 3, 4, 8)), [8, 2, 3, 7, 5, 4, 6, 2]]


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
  quantized = structure(dense, STACK, ROWS)
  run = lambda bits: np.asarray(quantized.apply(STACK, ROWS, bits))
  traced = jax.jit(quantized.apply)(STACK, ROWS, jnp.asarray([4, 17]))
  assert (run(np.asarray([4, 17])) == run(jnp.asarray([4, 17]))).all()
  np.testing.assert_allclose(run(np.asarray([4, 17])), traced, rtol=1e-6)


@pytest.mark.parametrize('batch', [1, 6, 9])
def test_any_number_of_images_will_do(residual, exact_ranges, batch):
  _, variables, images, quantized = residual
  images = jnp.tile(images, (2, 1, 1, 1))[:batch]
  bits = jnp.asarray(WIDTHS_TRIED[-1])
  actual = jax.jit(quantized.apply)(variables, images, bits, Bank(exact_ranges))
  expected = integer_reference(variables, images, exact_ranges, bits)
  np.testing.assert_array_equal(actual, expected.astype(np.float32))


def test_calibration_may_take_the_images_in_chunks(residual):
  apply, variables, images, _ = residual
  whole, parts = (
    nemo_jax.quantize(apply, variables, images, chunk=chunk).bank.ranges
    for chunk in (6, 4)
  )
  for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
    np.testing.assert_allclose(a, b, rtol=0.01)


def test_other_variables_may_be_given(residual, exact_ranges):
  _, variables, images, quantized = residual
  other = jax.tree.map(lambda x: on_grid(0.7 * x, 8), variables)
  bits = jnp.asarray(WIDTHS_TRIED[-1])
  actual = jax.jit(quantized.apply)(other, images, bits, Bank(exact_ranges))
  expected = integer_reference(other, images, exact_ranges, bits)
  np.testing.assert_array_equal(actual, expected.astype(np.float32))


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


# What cannot be quantized, and what may look as if it could not.


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
  quantized = structure(apply, STACK, ROWS)
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
  quantized = structure(apply, STACK, ROWS)
  assert [op.kind for op in quantized.operations] == ['dense']
  assert_float_beyond_16_bits(quantized, apply, STACK, ROWS)
  low = quantized.apply(STACK, ROWS, uniform(quantized, 2))
  assert np.isfinite(low).all()


def test_integer_images_are_fine():
  images = jnp.arange(20, dtype=jnp.uint8).reshape(5, 4)
  apply = lambda v, x: (x.astype(jnp.float32) / 255) @ v['w'][0]
  quantized = structure(apply, STACK, images)
  assert names(quantized) == ['w:input', 'w']
  assert_float_beyond_16_bits(quantized, apply, STACK, images)


def test_keys_captured_or_among_the_variables_are_fine():
  captured = jax.random.key(1)
  variables = {'w': normal(1, 4, 4), 'key': jax.random.key(2)}

  def apply(v, x):
    x = x + jax.random.normal(captured, x.shape)
    return (x * jax.random.bernoulli(v['key'], 0.5, x.shape)) @ v['w']

  quantized = structure(apply, variables, ROWS)
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
  quantized = structure(scaled(factor), STACK, ROWS)
  assert names(quantized) == ['w:input', 'w']
  assert_float_beyond_16_bits(quantized, scaled(factor), STACK, ROWS)


def test_a_function_that_captured_a_traced_value_may_be_quantized():
  @jax.jit
  def outside(factor):
    quantized = structure(scaled(factor), STACK, ROWS)
    return quantized.apply(STACK, ROWS, uniform(quantized, 32))

  expected = scaled(3.0)(STACK, ROWS)
  np.testing.assert_allclose(outside(3.0), expected, rtol=1e-5)


def test_outputs_keep_their_structure():
  def apply(v, x):
    x = x @ v['w'][0]
    return {'logits': x, 'rest': (x.sum(), [x > 0, None]), 'input': ROWS}

  quantized = structure(apply, STACK, ROWS)
  assert_float_beyond_16_bits(quantized, apply, STACK, ROWS)


def test_a_network_in_bfloat16_stays_in_it():
  def apply(v, x):
    w = v['w'].astype(jnp.bfloat16)
    x = jax.nn.relu(x.astype(jnp.bfloat16) @ w[0])
    return x @ w[1] + x @ w[2]

  quantized = structure(apply, STACK, ROWS)
  assert [q.is_weight for q in quantized.quantizers] == [0, 1, 0, 1, 1]
  assert_float_beyond_16_bits(quantized, apply, STACK, ROWS)
  run = jax.jit(quantized.apply)
  low = run(STACK, ROWS, uniform(quantized, 4))
  assert low.dtype == jnp.bfloat16


def test_the_channels_of_a_weight_on_the_left_are_its_outputs():
  apply = lambda v, x: (v['w'][0].T @ x.T).T
  quantized = structure(apply, STACK, ROWS)
  assert names(quantized) == ['w:input', 'w']
  assert quantized.quantizers[1].channel_axes == (0,)
  op = quantized.operations[0]
  assert (op.in_channels, op.out_channels, op.positions) == (4, 4, 1)
  assert op.macs == 16


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


def test_no_images_are_an_error():
  with pytest.raises(InputError, match='at least one image'):
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


def test_the_data_flow_of_an_addition_keeps_its_branches_apart():
  variables = {name: normal(i, 4, 4) for i, name in enumerate('abc')}

  def apply(v, x):
    return (jnp.tanh(x @ v['a']) + jnp.sin(x @ v['b'])) @ v['c']

  quantized = structure(apply, variables, normal(9, 8, 4), extra_ops=('add',))
  known = names(quantized)
  flow = quantized.structure.data_flow_graph
  edges = [
    (known[i], known[j])
    for i, j in zip(flow.senders, flow.receivers, strict=True)
  ]
  assert edges == [
    ('a:input', 'a'),
    ('a:input', 'b'),
    ('a', 'add:lhs'),
    ('b', 'add:rhs'),
    ('add:lhs', 'c:input'),
    ('add:rhs', 'c:input'),
    ('c:input', 'c'),
  ]


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


@pytest.mark.parametrize(
  'option', [{'chunk': 0}, {'percentile': 0}, {'percentile': 200}]
)
def test_numbers_out_of_range_are_refused(option):
  variables = {'a': normal(0, 4, 4)}
  with pytest.raises(InputError, match=f'{[*option][0]} is'):
    nemo_jax.quantize(
      lambda v, x: x @ v['a'], variables, normal(2, 8, 4), **option
    )
