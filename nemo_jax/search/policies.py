"""Policies: graph neural networks that give every node logits over choices.

Both have NEMO's layers (arXiv 2106.07611): a graph layer, SELU, graph
attention, SELU, a linear layer, SELU, logits. Graphs are `jraph.GraphsTuple`s;
`undirected` prepares them for message passing.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from nemo_jax.core.types import Array, ArrayLike
from nemo_jax.search.problem import Graph

_TILE = 32  # rows per tile of a product with a matrix that is mostly zeros


def _edges(
  adjacency: Bool[np.ndarray, 'N N'],
) -> tuple[Int[np.ndarray, ' edges'], Int[np.ndarray, ' edges']]:
  """Senders and receivers of the edges of an adjacency matrix; int32."""
  senders, receivers = np.nonzero(adjacency)
  return senders.astype(np.int32), receivers.astype(np.int32)


def _adjacency(graph: Graph) -> Bool[np.ndarray, 'N N']:
  """Adjacency matrix of a graph, by sender and receiver, with self-edges."""
  count = graph.nodes.shape[0]
  adjacency = np.eye(count, dtype=bool)
  adjacency[np.asarray(graph.senders), np.asarray(graph.receivers)] = True
  return adjacency


def undirected(graph: Graph) -> Graph:
  """The graph with every edge in both directions, and self-edges.

  A policy has to see the tensors that follow a tensor as well as those before
  it, and graph attention needs the self-edges.
  """
  adjacency = _adjacency(graph)
  senders, receivers = _edges(adjacency | adjacency.T)
  return graph._replace(
    senders=senders,
    receivers=receivers,
    n_edge=np.asarray([len(senders)], np.int32),
  )


def reach(graph: Graph, hops: int) -> Float[np.ndarray, 'N N']:
  """Matrix with 1 where two nodes are at most `hops` edges apart; float32."""
  step = _adjacency(graph).astype(np.float32)
  return (np.linalg.matrix_power(step, hops) > 0).astype(np.float32)


class Convolution(nn.Module):
  """Graph convolution (Kipf and Welling 2017); self-edges are in the graph.

  Sums over neighbors come before the dense layer: the nodes' features are the
  same for all networks, so these sums are computed only once. The graph's
  globals, which are further inputs at every node, may differ.
  """

  features: int

  @nn.compact
  def __call__(self, graph: Graph) -> Float[Array, 'N features']:
    """Returns new features of the nodes.

    Args:
      graph: with nodes [N, F], and globals [G] or None.
    """
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


def _neighbors(
  graph: Graph,
) -> tuple[Int[np.ndarray, 'D N'], Bool[np.ndarray, 'D N']]:
  """Senders to each node, padded to the largest in-degree D, and their mask."""
  order = np.argsort(graph.receivers, kind='stable')
  receivers = np.asarray(graph.receivers)[order]
  place = np.arange(len(order)) - np.searchsorted(receivers, receivers)
  shape = graph.nodes.shape[0], place.max() + 1
  table, present = np.zeros(shape, np.int32), np.zeros(shape, bool)
  table[receivers, place] = np.asarray(graph.senders)[order]
  present[receivers, place] = True
  return table.T, present.T


class _PairScores(nn.Module):
  """Dense layer on the two ends of an edge, as one term for each end."""

  @nn.compact
  def __call__(
    self, nodes: Float[Array, 'N F']
  ) -> tuple[Float[Array, 'N 1'], Float[Array, 'N 1']]:
    """Returns the terms of each node as a sender and as a receiver."""
    width = nodes.shape[1]
    start = nn.initializers.lecun_normal()
    kernel = self.param('kernel', start, (2 * width, 1))
    bias = self.param('bias', nn.initializers.zeros_init(), (1,))
    return nodes @ kernel[:width], nodes @ kernel[width:] + bias


def _attend(
  graph: Graph, features: int, name: str
) -> Float[Array, 'N {features}']:
  """Graph attention with one head (Velickovic et al. 2018)."""
  nodes = nn.Dense(features, use_bias=False, name=f'{name}_query')(graph.nodes)
  sent, received = _PairScores(name=f'{name}_logit')(nodes)
  # A loop over neighbors, which XLA fuses; it does not fuse sums over edges.
  table, present = _neighbors(graph)
  logits = [
    jnp.where(there[:, None], nn.leaky_relu(sent[rows] + received), -jnp.inf)
    for rows, there in zip(table, present, strict=True)
  ]
  highest = functools.reduce(jnp.maximum, logits)
  weights = [jnp.exp(x - highest) for x in logits]
  total = sum(w * nodes[rows] for w, rows in zip(weights, table, strict=True))
  return jnp.asarray(total / sum(weights))


def _head(
  graph: Graph, hidden: int, num_choices: int
) -> Float[Array, 'N {num_choices}']:
  """Logits: the layers after the graph layer, the same in both policies."""
  graph = graph._replace(nodes=nn.selu(graph.nodes))
  nodes = nn.selu(_attend(graph, hidden, 'attention'))
  nodes = nn.selu(nn.Dense(hidden, name='linear')(nodes))
  return nn.Dense(num_choices, name='logits')(nodes)


class GCN(nn.Module):
  """Policy with a graph convolution and attention.

  Attributes:
    num_choices: K.
    hidden: features of the hidden layers.
  """

  num_choices: int
  hidden: int = 8

  @nn.compact
  def __call__(self, graph: Graph) -> Float[Array, 'N K']:
    """Returns the logits of a graph with nodes [N, F]."""
    nodes = Convolution(self.hidden, name='convolution')(graph)
    graph = graph._replace(nodes=nodes)
    return _head(graph, self.hidden, self.num_choices)


def sums_within(
  graph: Graph, hops: int
) -> Callable[[Float[ArrayLike, 'N F']], Float[Array, 'N F']]:
  """Function from nodes to sums over the nodes at most `hops` edges away.

  The sums are the product with the matrix `reach`, which is the same for all
  networks, so that the sums of many networks are one matrix product. Nodes are
  numbered along the network. In a large graph, a tile of rows therefore has
  non-zeros in few columns; the product leaves out the other columns.
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
  kept: Float[Array, ' N'],
  nodes: Float[Array, 'N F'],
  features: int,
  name: str,
) -> Float[Array, 'N {features}']:
  """Graph convolution among the nodes where `kept` is 1; 0 at the others."""
  degree = jnp.maximum(sums(kept[:, None]), 1)
  scale = kept[:, None] * jax.lax.rsqrt(degree)
  return scale * sums(scale * nn.Dense(features, name=name)(nodes))


def _best(score: Float[Array, ' N'], count: int) -> Float[Array, ' N']:
  """Mask of the `count` highest scores and of ties with the lowest of them.

  It is 1 at these nodes and 0 at the others, in float32. The lowest of the
  scores is found bit by bit: sorting takes XLA twice as long.
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
  """Policy with a Graph U-Net (Gao and Ji 2019) and attention.

  Each level keeps the half of its nodes with the higher learned scores. Nodes
  that were two edges apart become neighbors, so that pooling does not
  disconnect the graph. Networks keep different nodes, so a level is a mask over
  all nodes, and its edges are those of a power of the whole graph.

  Attributes:
    num_choices: K.
    hidden: features of the hidden layers.
    depth: number of levels.
  """

  num_choices: int
  hidden: int = 8
  depth: int = 2

  @nn.compact
  def __call__(self, graph: Graph) -> Float[Array, 'N K']:
    """Returns the logits of a graph with nodes [N, F]."""
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
      # The gate makes the output depend on the score, and bounds the values.
      nodes = nodes * nn.sigmoid(score)[:, None]
      nodes = _convolve_kept(sums, kept, nodes, self.hidden, f'down_{level}')
      nodes = nn.selu(nodes)
    for level, (skip, sums, kept) in reversed(list(enumerate(levels))):
      nodes = skip + nodes
      nodes = _convolve_kept(sums, kept, nodes, self.hidden, f'up_{level}')
      nodes = nn.selu(nodes)
    return _head(graph._replace(nodes=nodes), self.hidden, self.num_choices)
