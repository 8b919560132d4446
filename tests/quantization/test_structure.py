"""Quantizers, operations and graphs of networks, counted by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemo_jax.quantization import transform
from tests.quantization.networks import (
  ROWS,
  STACK,
  assert_float_beyond_16_bits,
  edges,
  names,
  normal,
  operands,
  quick_quantize,
)


def weights(quantized):
  return [q.name for q in quantized.quantizers if q.is_weight]


# A Flax linen network.


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
  assert edges(linen[-1].structure.data_flow_graph) == [
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
  both = quick_quantize(apply, variables, images, extra_ops=('add', 'pool'))
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
  more = transform.inspect(apply, variables, images, extra_ops=(kind,))
  kinds = [op.kind for op in more.operations]
  assert sorted(kinds) == sorted([kind, *(op.kind for op in plain.operations)])
  assert len(more.quantizers) == len(plain.quantizers) + 1


def test_the_sequential_graph_is_a_chain_in_order_of_execution(linen):
  graph = linen[-1].structure.sequential_graph
  assert edges(graph) == [(i, i + 1) for i in range(9)]
  assert graph.n_node.tolist() == [10]
  assert graph.n_edge.tolist() == [9]


def test_both_graphs_have_the_same_features_of_nodes(linen):
  chain, flow = (
    linen[-1].structure.sequential_graph,
    linen[-1].structure.data_flow_graph,
  )
  np.testing.assert_array_equal(chain.nodes, flow.nodes)
  assert np.isfinite(chain.nodes).all()
  assert chain.nodes.min() >= 0
  assert chain.nodes.max() <= 1
  # No two quantizers look the same to a searcher.
  assert len(np.unique(chain.nodes, axis=0)) == len(chain.nodes)


def test_shapes_alone_tell_the_same_structure(linen):
  apply, variables, images, quantized = linen
  shapes = jax.eval_shape(lambda: (variables, images))
  found = transform.inspect(apply, *shapes)
  for field in dataclasses.fields(found):
    parts = (getattr(x, field.name) for x in (found, quantized.structure))
    jax.tree.map(np.testing.assert_array_equal, *parts)
  assert found.num_classes() == 5


# A Flax nnx network.


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


def test_the_channels_of_a_weight_on_the_left_are_its_outputs():
  apply = lambda v, x: (v['w'][0].T @ x.T).T
  quantized = quick_quantize(apply, STACK, ROWS)
  assert names(quantized) == ['w:input', 'w']
  assert quantized.quantizers[1].channel_axes == (0,)
  op = quantized.operations[0]
  assert (op.in_channels, op.out_channels, op.positions) == (4, 4, 1)
  assert op.macs == 16


def test_the_data_flow_of_an_addition_keeps_its_branches_apart():
  variables = {name: normal(i, 4, 4) for i, name in enumerate('abc')}

  def apply(v, x):
    return (jnp.tanh(x @ v['a']) + jnp.sin(x @ v['b'])) @ v['c']

  quantized = quick_quantize(
    apply, variables, normal(9, 8, 4), extra_ops=('add',)
  )
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
