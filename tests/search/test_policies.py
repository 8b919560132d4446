"""Policies against dense NumPy, breadth-first search, and their symmetries."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import jraph
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_jax.search import policies

CHOICES, HIDDEN, FEATURES = 3, 4, 2
MODELS = {
  'gcn': policies.GCN(CHOICES, HIDDEN),
  'graph_unet': policies.GraphUNet(CHOICES, HIDDEN),
}
# Two branches that join again, and one that ends.
BRANCHED = [(0, 1), (1, 2), (1, 3), (2, 4), (3, 4), (4, 5), (1, 6), (6, 7)]

# What takes time here is to compile.
quickly = functools.partial(
  jax.jit, compiler_options={'xla_backend_optimization_level': 0}
)
by_example = settings(max_examples=60, deadline=None, derandomize=True)


def make_graph(count, edges, seed=0):
  rng = np.random.default_rng(seed)
  ends = np.array(list(edges), np.int32).reshape(-1, 2)
  return jraph.GraphsTuple(
    nodes=rng.normal(size=(count, FEATURES)).astype(np.float32),
    edges=None,
    senders=ends[:, 0],
    receivers=ends[:, 1],
    n_node=np.array([count], np.int32),
    n_edge=np.array([len(ends)], np.int32),
    globals=None,
  )


def chain(count):
  return make_graph(count, [(i, i + 1) for i in range(count - 1)])


GRAPHS = {f'chain of {n}': chain(n) for n in (1, 2, 3, 7, 20)}
GRAPHS['branched'] = make_graph(8, BRANCHED)


@functools.cache
def compiled(model, graph):
  """(graph that is ready, jitted: weights and nodes [N, F] to logits)."""
  ready = policies.undirected(GRAPHS[graph])
  return ready, quickly(
    lambda weights, nodes: MODELS[model].apply(
      weights, ready._replace(nodes=nodes)
    )
  )


@functools.cache
def initializer(model):
  # Edges decide shapes, so that a graph is never an argument under jit.
  graph = policies.undirected(GRAPHS['branched'])
  return quickly(lambda key: MODELS[model].init(key, graph))


@functools.cache
def start(model, seed=0):
  """Weights, with biases that are not zero; they fit every graph."""
  weights = initializer(model)(jax.random.key(seed))
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: np.asarray(x) + rng.normal(0, 0.1, x.shape).astype(np.float32),
    weights,
  )


def edge_sets(count):
  return st.sets(
    st.tuples(st.integers(0, count - 1), st.integers(0, count - 1)),
    max_size=2 * count,
  )


random_edges = st.integers(1, 9).flatmap(
  lambda count: st.tuples(st.just(count), edge_sets(count))
)


def as_set(senders, receivers):
  """The edges as pairs, after a look that none is there twice."""
  pairs = list(zip(senders.tolist(), receivers.tolist(), strict=True))
  assert len(pairs) == len(set(pairs))
  return set(pairs)


def adjacency(count, pairs):
  matrix = np.zeros((count, count))
  for sender, receiver in pairs:
    matrix[receiver, sender] = 1
  return matrix


# Edges.


@by_example
@given(random_edges, st.booleans())
def test_undirected_has_both_directions_and_one_self_edge_each(case, twice):
  count, edges = case
  given_edges = list(edges) * (2 if twice else 1)
  graph = policies.undirected(make_graph(count, given_edges))
  expected = {(i, i) for i in range(count)} | edges
  expected |= {(receiver, sender) for sender, receiver in edges}
  assert as_set(graph.senders, graph.receivers) == expected
  assert graph.n_edge.tolist() == [len(expected)]
  assert graph.senders.dtype == graph.receivers.dtype == np.int32


def near(count, edges, start_node, hops):
  """All nodes at most `hops` steps from one, by breadth-first search."""
  seen = frontier = {start_node}
  for _ in range(hops):
    frontier = {b for a, b in edges if a in frontier} - seen
    seen = seen | frontier
  return seen


@by_example
@given(random_edges, st.integers(1, 5))
def test_reach_is_what_breadth_first_search_finds(case, hops):
  count, edges = case
  pairs = as_set(*np.nonzero(policies.reach(make_graph(count, edges), hops)))
  for node in range(count):
    found = {receiver for sender, receiver in pairs if sender == node}
    assert found == near(count, edges, node, hops)


@by_example
@given(
  st.integers(1, 60),
  st.lists(st.tuples(st.integers(0, 59), st.integers(2, 5)), max_size=4),
  st.integers(1, 4),
  st.integers(1, 9),
)
def test_sums_are_the_product_with_the_matrix_of_reach(n, skips, hops, tile):
  edges = {(i, i + 1) for i in range(n - 1)}
  edges |= {(start, start + far) for start, far in skips if start + far < n}
  graph = make_graph(n, edges)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(networks, '_TILE', tile)
    sums = policies.sums_within(graph, hops)(graph.nodes)
  expected = policies.reach(graph, hops) @ graph.nodes
  np.testing.assert_allclose(sums, expected, rtol=1e-5, atol=1e-5)


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


# Pooling.


@pytest.mark.parametrize('graph', GRAPHS)
def test_every_pooling_keeps_the_better_half(graph):
  ready, _ = compiled('graph_unet', graph)

  def watched(weights):
    inputs, scores = {}, {}

    def watch(run, arguments, keywords, context):
      out = run(*arguments, **keywords)
      name = context.module.name or ''
      if name.startswith(('score', 'up')):
        inputs[name], scores[name] = arguments[0], out[:, 0]
      return out

    with nn.intercept_methods(watch):
      MODELS['graph_unet'].apply(weights, ready)
    return inputs, scores

  inputs, scores = quickly(watched)(start('graph_unet'))
  # The deepest level joins what the two above have; see what is left of it.
  outputs = [inputs['score_1'], inputs['up_1'] - inputs['score_1']]
  kept = np.ones(len(ready.nodes), bool)
  for level, nodes in enumerate(outputs):
    score = np.where(kept, scores[f'score_{level}'], -np.inf)
    count = -(-kept.sum() // 2)
    kept = np.any(np.abs(nodes) > 1e-6, axis=1)
    np.testing.assert_array_equal(kept, score >= np.sort(score)[-count])


class Kept(nn.Module):
  """One convolution among the nodes that are kept."""

  @nn.compact
  def __call__(self, sums, kept, nodes):
    return policies._convolve_kept(sums, kept, nodes, HIDDEN, 'convolution')


class Sparse(nn.Module):
  """The same by jraph."""

  @nn.compact
  def __call__(self, graph):
    layer = nn.Dense(HIDDEN, name='convolution')
    return jraph.GraphConvolution(layer)(graph).nodes


class Shared(nn.Module):
  """The same, of features that all networks share."""

  @nn.compact
  def __call__(self, graph):
    return policies.Convolution(HIDDEN, name='convolution')(graph)


@pytest.mark.parametrize('graph', GRAPHS)
def test_convolutions_by_matrix_and_by_edges_are_the_same(graph):
  ready, _ = compiled('gcn', graph)
  weights = Sparse().init(jax.random.key(0), ready)
  sums, count = policies.sums_within(ready, 1), len(ready.nodes)
  np.testing.assert_allclose(
    Kept().apply(weights, sums, np.ones(count), ready.nodes),
    Sparse().apply(weights, ready),
    rtol=1e-5,
    atol=1e-6,
  )
  np.testing.assert_allclose(
    Shared().apply(weights, ready),
    Sparse().apply(weights, ready),
    rtol=1e-5,
    atol=1e-6,
  )
  # Of some nodes, what a graph of them alone gives.
  rows = np.arange(0, count, 2)
  kept = np.zeros(count)
  kept[rows] = 1
  one = Kept().apply(weights, sums, kept, ready.nodes)
  part = policies.reach(ready, 1)[np.ix_(rows, rows)]
  alone = Kept().apply(
    weights, lambda x: part @ x, np.ones(len(rows)), ready.nodes[rows]
  )
  np.testing.assert_allclose(one[rows], alone, rtol=1e-5, atol=1e-6)
  assert not np.any(np.delete(one, rows, axis=0))


def test_globals_are_inputs_at_every_node():
  ready, _ = compiled('gcn', 'branched')
  seen = np.array([0.5, -2.0, 3.0], np.float32)
  everywhere = np.tile(seen, (len(ready.nodes), 1))
  wide = np.concatenate([ready.nodes, everywhere], axis=1)
  weights = Sparse().init(jax.random.key(0), ready._replace(nodes=wide))
  weights['params']['convolution']['bias'] += 0.3
  np.testing.assert_allclose(
    Shared().apply(weights, ready._replace(globals=seen)),
    Sparse().apply(weights, ready._replace(nodes=wide)),
    rtol=1e-5,
    atol=1e-6,
  )


SCORES = st.one_of(
  st.floats(width=32, allow_nan=False),
  st.sampled_from([0.0, -0.0, 1.0, -1.0, np.inf, -np.inf]),
)


@by_example
@given(st.lists(SCORES, min_size=1, max_size=20), st.data())
def test_the_best_are_no_worse_than_the_last_that_is_wanted(scores, data):
  scores = np.array(scores, np.float32)
  count = data.draw(st.integers(1, len(scores)))
  least = np.sort(scores)[-count]
  np.testing.assert_array_equal(policies._best(scores, count), scores >= least)
