"""Policies: graph neural networks that give every node logits over choices.

Both follow NEMO's sequence: a graph layer, SELU, graph attention, SELU, a
linear layer, SELU, logits. Graphs are `jraph.GraphsTuple`s; `undirected` makes
them ready for message passing.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import jraph
import numpy as np

from nemo_jax.base import Array

_TILE = 32  # rows of a product with a matrix that is mostly zeros


def _edges(adjacency: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  senders, receivers = np.nonzero(adjacency)
  return senders.astype(np.int32), receivers.astype(np.int32)


def _adjacency(graph: jraph.GraphsTuple) -> np.ndarray:
  count = graph.nodes.shape[0]
  adjacency = np.eye(count, dtype=bool)
  adjacency[np.asarray(graph.senders), np.asarray(graph.receivers)] = True
  return adjacency


def undirected(graph: jraph.GraphsTuple) -> jraph.GraphsTuple:
  """The graph with every edge both ways and an edge from each node to itself.

  Searchers have to see what follows a tensor as well as what precedes it, and
  `jraph.GAT` assumes self-edges.
  """
  adjacency = _adjacency(graph)
  senders, receivers = _edges(adjacency | adjacency.T)
  return graph._replace(
    senders=senders,
    receivers=receivers,
    n_edge=np.asarray([len(senders)], np.int32),
  )


def _convolve(graph: jraph.GraphsTuple, features: int, name: str):
  """A graph convolution (Kipf and Welling 2017); self-edges are in the graph.

  The dense layer is made by the caller's module, under `name`.
  """
  layer = jraph.GraphConvolution(nn.Dense(features, name=name))
  return layer(graph)


def _attend(graph: jraph.GraphsTuple, features: int, name: str):
  """Graph attention of one head (Velickovic et al. 2018)."""
  query = nn.Dense(features, use_bias=False, name=f'{name}_query')
  logit = nn.Dense(1, use_bias=False, name=f'{name}_logit')

  def attention(sent, received, edges):
    del edges
    return nn.leaky_relu(logit(jnp.concatenate([sent, received], axis=-1)))

  return jraph.GAT(query, attention, node_update_fn=lambda x: x)(graph)


def _head(graph: jraph.GraphsTuple, hidden: int, num_choices: int) -> Array:
  """What follows the graph layer in both policies."""
  graph = graph._replace(nodes=nn.selu(graph.nodes))
  graph = _attend(graph, hidden, 'attention')
  nodes = nn.selu(nn.Dense(hidden, name='linear')(nn.selu(graph.nodes)))
  return nn.Dense(num_choices, name='logits')(nodes)


class GCN(nn.Module):
  """Logits [N, K] by graph convolution and attention."""

  num_choices: int
  hidden: int = 8

  @nn.compact
  def __call__(self, graph: jraph.GraphsTuple) -> Array:
    """Applies the policy to a graph with nodes [N, F]."""
    graph = _convolve(graph, self.hidden, 'convolution')
    return _head(graph, self.hidden, self.num_choices)


def reach(graph: jraph.GraphsTuple, hops: int) -> np.ndarray:
  """float32[N, N]: 1 where two nodes are at most `hops` edges apart."""
  step = _adjacency(graph).astype(np.float32)
  return (np.linalg.matrix_power(step, hops) > 0).astype(np.float32)


def sums_within(
  graph: jraph.GraphsTuple, hops: int
) -> Callable[[Array], Array]:
  """From nodes [N, F] to sums [N, F] over those at most `hops` edges away.

  The product with `reach`, the same for all networks, so that those of many are
  one product of matrices. Nodes are numbered along the network, so that a few
  rows of a large graph reach few columns; the others take no part.
  """
  near = reach(graph, hops)
  count = len(near)
  starts = np.arange(0, count, _TILE)
  columns = [np.flatnonzero(near[s : s + _TILE].any(axis=0)) for s in starts]
  width = max(c[-1] - c[0] + 1 for c in columns)
  if 2 * width > count:
    return lambda nodes: near @ nodes
  firsts = [min(c[0], count - width) for c in columns]
  padded = np.pad(near, ((0, len(starts) * _TILE - count), (0, 0)))
  tiles = np.stack(
    [
      padded[s : s + _TILE, f : f + width]
      for s, f in zip(starts, firsts, strict=True)
    ]
  )

  def sums(nodes):
    windows = jnp.stack([nodes[f : f + width] for f in firsts])
    return (tiles @ windows).reshape(-1, nodes.shape[1])[:count]

  return sums


def _convolve_kept(
  sums: Callable[[Array], Array],
  kept: Array,
  nodes: Array,
  features: int,
  name: str,
):
  """The graph convolution among the nodes that are kept; 0 at the others."""
  degree = jnp.maximum(sums(kept[:, None]), 1)
  scale = kept[:, None] * jax.lax.rsqrt(degree)
  return scale * sums(scale * nn.Dense(features, name=name)(nodes))


class GraphUNet(nn.Module):
  """Logits [N, K] by a Graph U-Net (Gao and Ji 2019) and attention.

  Each level keeps the better half of its nodes by a learned score and joins
  those that were two edges apart, so that pooling does not tear the graph.
  Which nodes are kept differs between networks, so a level is a mask over the
  nodes; its edges are those of the power of the whole graph that its joins
  amount to.
  """

  num_choices: int
  hidden: int = 8
  depth: int = 2

  @nn.compact
  def __call__(self, graph: jraph.GraphsTuple) -> Array:
    """Applies the policy to a graph with nodes [N, F]."""
    graph = _convolve(graph, self.hidden, 'convolution')
    nodes = nn.selu(graph.nodes)
    count = nodes.shape[0]
    sums, kept = sums_within(graph, 1), jnp.ones(count)
    levels = []
    for level in range(self.depth):
      levels.append((nodes, sums, kept))
      score = nn.Dense(1, name=f'score_{level}')(nodes)[:, 0]
      count = (count + 1) // 2
      _, best = jax.lax.top_k(jnp.where(kept > 0, score, -jnp.inf), count)
      kept = jnp.zeros_like(kept).at[best].set(1)
      sums = sums_within(graph, 2 ** (level + 1))
      # The gate lets the score be learned, and bounds what passes.
      nodes = nodes * nn.sigmoid(score)[:, None]
      nodes = _convolve_kept(sums, kept, nodes, self.hidden, f'down_{level}')
      nodes = nn.selu(nodes)
    for level, (skip, sums, kept) in reversed(list(enumerate(levels))):
      nodes = skip + nodes
      nodes = _convolve_kept(sums, kept, nodes, self.hidden, f'up_{level}')
      nodes = nn.selu(nodes)
    return _head(graph._replace(nodes=nodes), self.hidden, self.num_choices)
