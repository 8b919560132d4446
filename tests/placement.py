"""A search that has nothing to do with quantization: tensors in memories.

A chain of tensors has to be placed in three memories. Flash is slow, DRAM is
fast and hungry, SRAM is fast, frugal and small. What is placed in the two fast
ones beyond their capacity is overflow. A tensor that is written at run time
cannot be in flash, and a large one not in SRAM.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import jraph
import numpy as np

import nemo_jax
from nemo_jax.search.problem import Prior

# KiB, and whether the tensor is written at run time.
TENSORS = [
  (8, True),
  (96, False),
  (24, False),
  (160, True),
  (48, False),
  (12, True),
  (200, False),
  (32, False),
  (64, True),
  (16, False),
  (120, False),
  (40, True),
]
FLASH, DRAM, SRAM = range(3)
BANDWIDTH = np.array([20, 100, 400], np.float32)  # KiB per microsecond
ENERGY = np.array([4, 10, 1], np.float32)  # nanojoule per KiB
COPY = 2.0  # nanojoule per KiB, to a neighbour in another memory
LARGEST_IN_SRAM = 64
OBJECTIVES = ('latency', 'energy', 'overflow')


def evaluate(data, choices):
  """Objectives [3] of one placement [N]; small is good."""
  latency = jnp.sum(data['sizes'] / data['bandwidth'][choices])
  return jnp.concatenate([latency[None], costs(data, choices)])


def costs(data, choices):
  """Energy and overflow of a placement."""
  sizes = data['sizes']
  moved = jnp.where(choices[1:] != choices[:-1], sizes[:-1], 0)
  energy = jnp.sum(sizes * data['energy'][choices]) + COPY * jnp.sum(moved)
  used = jnp.sum(sizes[:, None] * jax.nn.one_hot(choices, 3), axis=0)
  overflow = jnp.sum(jnp.maximum(used - data['capacity'], 0))
  return jnp.stack([energy, overflow])


def additive_prior(sizes: np.ndarray) -> Prior:
  """Latency, at prices for energy and for room in the two fast memories."""
  nodes, copied = len(sizes), COPY * sizes[:-1]
  energy = sizes[:, None] * ENERGY
  used = sizes[:, None, None] * np.eye(3, dtype=np.float32)[:, [DRAM, SRAM]]
  pair_costs = np.zeros((nodes - 1, 3, 3, 3), np.float32)
  pair_costs[..., 0] = copied[:, None, None] * (1 - np.eye(3))
  return Prior(
    loss=sizes[:, None] / BANDWIDTH,
    costs=np.concatenate([energy[..., None], used], axis=-1),
    pairs=np.stack([np.arange(nodes - 1), np.arange(1, nodes)], axis=1),
    pair_costs=pair_costs,
  )


def placement_problem(nodes: int = 12) -> nemo_jax.Problem:
  """The first `nodes` tensors, with bounds that no placement exceeds."""
  sizes = np.array([size for size, _ in TENSORS[:nodes]], np.float32)
  written = np.array([written for _, written in TENSORS[:nodes]])
  allowed = np.ones((nodes, 3), bool)
  allowed[:, FLASH] = ~written
  allowed[:, SRAM] = sizes <= LARGEST_IN_SRAM
  capacity = np.array([np.inf, sizes.sum() / 3, sizes.sum() / 10], np.float32)

  def bound(pick, prices, worst):
    return pick(np.where(allowed, sizes[:, None] * prices, worst), axis=1).sum()

  ideal = [
    bound(np.min, 1 / BANDWIDTH, np.inf),
    bound(np.min, ENERGY, np.inf),
    0,
  ]
  reference = [
    bound(np.max, 1 / BANDWIDTH, 0),
    bound(np.max, ENERGY, 0) + COPY * sizes[:-1].sum(),
    sizes.sum(),
  ]
  features = [sizes / sizes.max(), written, np.linspace(0, 1, nodes)]
  graph = jraph.GraphsTuple(
    nodes=np.stack(features, axis=1).astype(np.float32),
    edges=None,
    senders=np.arange(nodes - 1, dtype=np.int32),
    receivers=np.arange(1, nodes, dtype=np.int32),
    n_node=np.array([nodes], np.int32),
    n_edge=np.array([nodes - 1], np.int32),
    globals=None,
  )
  values = {
    'sizes': sizes,
    'bandwidth': BANDWIDTH,
    'energy': ENERGY,
    'capacity': capacity,
  }
  data = jax.tree.map(jnp.asarray, values)
  return nemo_jax.Problem(
    graph=graph,
    data=data,
    allowed=jnp.asarray(allowed),
    ideal=jnp.array(ideal, jnp.float32),
    reference=jnp.array(reference, jnp.float32),
    evaluate=evaluate,
    objective_names=OBJECTIVES,
    prior=additive_prior(sizes),
    known_objectives=functools.partial(costs, data),
  )


def brute_force_front(problem: nemo_jax.Problem) -> np.ndarray:
  """float32[n, 3]: the distinct objectives on the Pareto front, all tried."""
  options = [np.flatnonzero(row) for row in np.asarray(problem.allowed)]
  everything = np.array(list(itertools.product(*options)), np.int32)
  assert len(everything) <= 10_000, 'too many placements to try them all'
  price = jax.jit(jax.vmap(problem.evaluate, in_axes=(None, 0)))
  objectives = np.unique(price(problem.data, everything), axis=0)
  a, b = objectives[:, None], objectives[None]
  dominated = ((a <= b).all(-1) & (a < b).any(-1)).any(0)
  return objectives[~dominated]
