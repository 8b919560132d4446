"""Policies against dense NumPy, how far they see, and their symmetries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemo_jax.search import policies
from tests.search.compiling import quickly
from tests.search.graphs import (
  BRANCHED,
  CHOICES,
  GRAPHS,
  MODELS,
  adjacency,
  as_set,
  compiled,
  make_graph,
  near,
  start,
)

# Logits.


@pytest.mark.parametrize('graph', GRAPHS)
@pytest.mark.parametrize('model', MODELS)
def test_logits_are_finite_one_row_a_node(model, graph):
  ready, apply = compiled(model, graph)
  logits = apply(start(model), ready.nodes)
  assert logits.shape == (len(ready.nodes), CHOICES)
  assert logits.dtype == jnp.float32
  assert jnp.isfinite(logits).all()


@pytest.mark.parametrize('model', MODELS)
def test_networks_of_a_population_do_not_mix(model):
  ready, apply = compiled(model, 'chain of 7')
  single = [start(model, seed) for seed in range(4)]
  population = jax.tree.map(lambda *x: jnp.stack(x), *single)
  together = quickly(jax.vmap(apply.__wrapped__, in_axes=(0, None)))(
    population, ready.nodes
  )
  assert together.shape == (4, 7, CHOICES)
  apart = [apply(weights, ready.nodes) for weights in single]
  np.testing.assert_allclose(together, apart, rtol=1e-4, atol=1e-5)
  assert len(np.unique(np.round(together, 3), axis=0)) == 4


def selu(x):
  positive, negative = 1.0507009873554805, 1.7580993408473766
  return np.where(x > 0, positive * x, negative * np.expm1(np.minimum(x, 0)))


def dense(params, name, x):
  layer = {k: np.asarray(v, np.float64) for k, v in params[name].items()}
  return x @ layer['kernel'] + layer.get('bias', 0)


def normalized(matrix):
  """D^-1/2 A D^-1/2 of a symmetric matrix."""
  scale = 1 / np.sqrt(matrix.sum(1))
  return scale[:, None] * matrix * scale[None, :]


def gcn_in_numpy(params, matrix, nodes):
  """Kipf and Welling's layer, then Velickovic's, with all pairs of nodes."""
  hidden = normalized(matrix) @ dense(params, 'convolution', nodes)
  query = dense(params, 'attention_query', selu(hidden))
  count = len(query)
  sent = np.repeat(query[None], count, axis=0)  # [receiver, sender, H]
  received = np.repeat(query[:, None], count, axis=1)
  scores = dense(
    params, 'attention_logit', np.concatenate([sent, received], axis=-1)
  )[..., 0]
  scores = np.where(scores > 0, scores, 0.01 * scores)
  weights = np.where(matrix > 0, np.exp(scores), 0)
  weights /= weights.sum(1, keepdims=True)
  hidden = selu(dense(params, 'linear', selu(weights @ query)))
  return dense(params, 'logits', hidden)


@pytest.mark.parametrize('graph', GRAPHS)
def test_gcn_equals_dense_matrices(graph):
  ready, apply = compiled('gcn', graph)
  matrix = adjacency(len(ready.nodes), as_set(ready.senders, ready.receivers))
  for seed in range(3):
    weights = start('gcn', seed)
    expected = gcn_in_numpy(
      weights['params'], matrix, ready.nodes.astype(np.float64)
    )
    logits = apply(weights, ready.nodes)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


# How far they see.


def touched(model, graph, node):
  """bool[N]: whose logits any of some networks changes with one node."""
  ready, apply = compiled(model, graph)
  moved = ready.nodes.copy()
  moved[node] += 1
  changes = [
    np.asarray(apply(start(model, seed), ready.nodes))
    != np.asarray(apply(start(model, seed), moved))
    for seed in range(5)
  ]
  return np.any(changes, axis=(0, 2))


@pytest.mark.parametrize('node', [0, 9])
def test_gcn_sees_two_edges_both_ways_and_no_further(node):
  expected = np.abs(np.arange(20) - node) <= 2
  np.testing.assert_array_equal(touched('gcn', 'chain of 20', node), expected)


def test_gcn_sees_along_branches_and_no_further():
  both_ways = BRANCHED + [(b, a) for a, b in BRANCHED]
  for node in range(8):
    expected = near(8, both_ways, node, 2)
    found = np.flatnonzero(touched('gcn', 'branched', node))
    assert set(found.tolist()) == expected


def test_graph_unet_sees_further_than_gcn():
  seen = touched('graph_unet', 'chain of 20', 0)
  assert seen[:3].all()
  assert seen[6:].any()


@pytest.mark.parametrize('model', MODELS)
def test_order_of_nodes_does_not_matter(model):
  count, order = 8, np.random.default_rng(0).permutation(8)
  place = np.argsort(order)  # where each node has gone
  graph = GRAPHS['branched']
  shuffled = make_graph(count, [(place[a], place[b]) for a, b in BRANCHED])
  shuffled = shuffled._replace(nodes=graph.nodes[order])
  shuffled = policies.undirected(shuffled)
  moved = quickly(lambda w: MODELS[model].apply(w, shuffled))(start(model))
  ready, apply = compiled(model, 'branched')
  logits = apply(start(model), ready.nodes)
  np.testing.assert_allclose(moved, logits[order], rtol=1e-4, atol=1e-5)
