"""Graphs that searchers read: one node for each quantizer."""

from collections.abc import Sequence
from typing import Any

import jraph
import numpy as np
from jaxtyping import Float

from nemo_jax.quantization.trace.analysis import Analysis
from nemo_jax.quantization.trace.operations import KINDS


def _node_features(analysis: Analysis) -> Float[np.ndarray, 'N F']:
  """Features of each quantizer, float32, after those of NEMO.

  The kind of the first operation that consumes it, one-hot; whether it is a
  weight; whether the operation is depthwise; then, as log(1 + x), the input and
  output channels, output positions, kernel taps, stride, parameters and MACs of
  the operation; and last the index of the quantizer. All but the flags are
  divided by their maximum over the network.
  """
  first = {}
  for operation in analysis.operations:
    for quantizer in operation.operands:
      first.setdefault(quantizer, operation)
  rows, sizes = [], []
  for i, quantizer in enumerate(analysis.quantizers):
    op = first[i]
    one_hot = [float(op.kind == kind) for kind in KINDS]
    rows.append([*one_hot, quantizer.is_weight, op.kind == 'depthwise'])
    counts = (op.in_channels, op.out_channels, op.positions, op.kernel)
    sizes.append([*counts, op.stride, op.parameters, op.macs, i])
  sizes = np.log1p(np.asarray(sizes, np.float64))
  sizes[:, -1] = np.arange(len(rows))
  sizes /= np.maximum(sizes.max(axis=0), 1e-9)
  return np.concatenate([np.asarray(rows), sizes], axis=1).astype(np.float32)


def _graph(
  nodes: np.ndarray, edges: Sequence[tuple[int, int]]
) -> jraph.GraphsTuple:
  """A graph of nodes [N, F] and edges from first to second."""
  senders, receivers = np.asarray(edges, np.int32).reshape(-1, 2).T
  graph: Any = jraph.GraphsTuple  # declares JAX arrays; NumPy's are as good
  return graph(
    nodes=nodes,
    edges=None,
    senders=senders,
    receivers=receivers,
    globals=None,
    n_node=np.asarray([len(nodes)], np.int32),
    n_edge=np.asarray([len(senders)], np.int32),
  )


def sequential_graph(analysis: Analysis) -> jraph.GraphsTuple:
  """NEMO's graph: one node for each quantizer, in a chain by execution."""
  count = len(analysis.quantizers)
  chain = list(zip(range(count), range(1, count), strict=False))
  return _graph(_node_features(analysis), chain)


def data_flow_graph(analysis: Analysis) -> jraph.GraphsTuple:
  """Graph of one node for each quantizer, with edges along the data flow.

  Within an operation, an edge leads from the activation to the weight. Between
  operations, an edge leads from the weight of the producer, or else from its
  activations, to the activation of the consumer. For a network without branches
  this is the sequential graph.
  """
  edges, last = [], []
  for op in analysis.operations:
    active = op.operands[: len(op.sources)]
    weights = op.operands[len(op.sources) :]
    edges += [(a, w) for a in active for w in weights]
    last.append(weights or active)
    for activation, sources in zip(active, op.sources, strict=True):
      edges += [(q, activation) for i in sources for q in last[i]]
  return _graph(_node_features(analysis), sorted(set(edges)))
