"""Small graphs, and both policies on them."""

import functools

import jax
import jraph
import numpy as np
from hypothesis import settings

from nemo_jax.search import policies
from tests.search.compiling import quickly

by_example = settings(max_examples=60, deadline=None, derandomize=True)
CHOICES, HIDDEN, FEATURES = 3, 4, 2
MODELS = {
  'gcn': policies.GCN(CHOICES, HIDDEN),
  'graph_unet': policies.GraphUNet(CHOICES, HIDDEN),
}
# Two branches that join again, and one that ends.
BRANCHED = [(0, 1), (1, 2), (1, 3), (2, 4), (3, 4), (4, 5), (1, 6), (6, 7)]


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


def near(count, edges, start_node, hops):
  """All nodes at most `hops` steps from one, by breadth-first search."""
  seen = frontier = {start_node}
  for _ in range(hops):
    frontier = {b for a, b in edges if a in frontier} - seen
    seen = seen | frontier
  return seen
