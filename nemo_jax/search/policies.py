"""Policies: graph neural networks that give every node logits over choices.

Both follow NEMO's sequence: a graph layer, SELU, graph attention, SELU, a
linear layer, SELU, logits. Graphs are `jraph.GraphsTuple`s; `undirected` makes
them ready for message passing.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from nemo_jax.core.types import Array
from nemo_jax.search.problem import Graph

_TILE = 32  # rows of a product with a matrix that is mostly zeros


def _edges(adjacency: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  senders, receivers = np.nonzero(adjacency)
  return senders.astype(np.int32), receivers.astype(np.int32)


def _adjacency(graph: Graph) -> np.ndarray:
  count = graph.nodes.shape[0]
  adjacency = np.eye(count, dtype=bool)
  adjacency[np.asarray(graph.senders), np.asarray(graph.receivers)] = True
  return adjacency


def undirected(graph: Graph) -> Graph:
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


def reach(graph: Graph, hops: int) -> np.ndarray:
  """float32[N, N]: 1 where two nodes are at most `hops` edges apart."""
  step = _adjacency(graph).astype(np.float32)
  return (np.linalg.matrix_power(step, hops) > 0).astype(np.float32)


class Convolution(nn.Module):
  """A graph convolution (Kipf and Welling 2017); self-edges are in the graph.

  Sums over neighbors come before the layer, for its inputs are the same for all
  networks; what is not are the graph's globals, inputs at every node.
  """

  features: int

  @nn.compact
  def __call__(self, graph: Graph) -> Array:
    """From nodes [N, F], and globals [G] or None, to [N, features]."""
    near = reach(graph, 1)
    scale = near.sum(axis=1) ** -0.5
    near = scale[:, None] * near * scale
    nodes = near @ graph.nodes
    given = np.zeros(0) if graph.globals is None else graph.globals
    width = nodes.shape[1]
    start = nn.initializers.lecun_normal()
    kernel = self.param('kernel', start, (width + len(given), self.features))
    bias = self.param('bias', nn.initializers.zeros_init(), (self.features,))
    everywhere = given @ kernel[width:] + bias
    return nodes @ kernel[:width] + near.sum(axis=1)[:, None] * everywhere


def _neighbors(graph: Graph) -> tuple[np.ndarray, np.ndarray]:
  """int32[D, N], the senders to each node, and bool[D, N], which there are."""
  order = np.argsort(graph.receivers, kind='stable')
  receivers = np.asarray(graph.receivers)[order]
  place = np.arange(len(order)) - np.searchsorted(receivers, receivers)
  shape = graph.nodes.shape[0], place.max() + 1
  table, present = np.zeros(shape, np.int32), np.zeros(shape, bool)
  table[receivers, place] = np.asarray(graph.senders)[order]
  present[receivers, place] = True
  return table.T, present.T


class _PairScores(nn.Module):
  """A dense layer on both ends of edges, as two numbers at every node."""

  @nn.compact
  def __call__(self, nodes: Array) -> tuple[Array, Array]:
    """From nodes [N, F] to the parts [N, 1] of a sender and of a receiver."""
    width = nodes.shape[1]
    start = nn.initializers.lecun_normal()
    kernel = self.param('kernel', start, (2 * width, 1))
    bias = self.param('bias', nn.initializers.zeros_init(), (1,))
    return nodes @ kernel[:width], nodes @ kernel[width:] + bias


def _attend(graph: Graph, features: int, name: str) -> Array:
  """Graph attention of one head (Velickovic et al. 2018)."""
  nodes = nn.Dense(features, use_bias=False, name=f'{name}_query')(graph.nodes)
  sent, received = _PairScores(name=f'{name}_logit')(nodes)
  # Neighbors in turn, which XLA fuses; it does not fuse sums over edges.
  table, present = _neighbors(graph)
  logits = [
    jnp.where(there[:, None], nn.leaky_relu(sent[rows] + received), -jnp.inf)
    for rows, there in zip(table, present, strict=True)
  ]
  highest = functools.reduce(jnp.maximum, logits)
  weights = [jnp.exp(x - highest) for x in logits]
  total = sum(w * nodes[rows] for w, rows in zip(weights, table, strict=True))
  return jnp.asarray(total / sum(weights))


def _head(graph: Graph, hidden: int, num_choices: int) -> Array:
  """What follows the graph layer in both policies."""
  graph = graph._replace(nodes=nn.selu(graph.nodes))
  nodes = nn.selu(_attend(graph, hidden, 'attention'))
  nodes = nn.selu(nn.Dense(hidden, name='linear')(nodes))
  return nn.Dense(num_choices, name='logits')(nodes)


class GCN(nn.Module):
  """Logits [N, K] by graph convolution and attention."""

  num_choices: int
  hidden: int = 8

  @nn.compact
  def __call__(self, graph: Graph) -> Array:
    """Applies the policy to a graph with nodes [N, F]."""
    nodes = Convolution(self.hidden, name='convolution')(graph)
    graph = graph._replace(nodes=nodes)
    return _head(graph, self.hidden, self.num_choices)


def sums_within(graph: Graph, hops: int) -> Callable[[Array], Array]:
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
    return lambda nodes: jnp.asarray(near @ nodes)
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


def _best(score: Array, count: int) -> Array:
  """float32[N]: 1 at the `count` best nodes, and at those as good as the last.

  The bits of the least score among them are found one by one: XLA takes twice
  as long to sort.
  """
  score = jnp.where(score == 0, 0.0, score).view(jnp.int32)
  score ^= (score >> 31) & 0x7FFFFFFF
  enough = lambda least: jnp.sum((score >= least).astype(jnp.float32)) >= count

  def halve(bit, least):
    more = least + jnp.left_shift(1, 30 - bit)
    return jnp.where(enough(more), more, least)

  least = jnp.where(enough(0), 0, jnp.iinfo(jnp.int32).min)
  least = jax.lax.fori_loop(0, 31, halve, least)
  return (score >= least).astype(jnp.float32)


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
  def __call__(self, graph: Graph) -> Array:
    """Applies the policy to a graph with nodes [N, F]."""
    nodes = nn.selu(Convolution(self.hidden, name='convolution')(graph))
    count = nodes.shape[0]
    sums, kept = sums_within(graph, 1), jnp.ones(count)
    levels = []
    for level in range(self.depth):
      levels.append((nodes, sums, kept))
      score = nn.Dense(1, name=f'score_{level}')(nodes)[:, 0]
      count = (count + 1) // 2
      kept = _best(jnp.where(kept > 0, score, -jnp.inf), count)
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
