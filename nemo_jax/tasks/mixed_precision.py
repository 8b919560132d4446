"""Mixed-precision quantization as a search problem."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jraph
import numpy as np
from jax.sharding import PartitionSpec

from nemo_jax.core import batches, devices, memory
from nemo_jax.core.types import Array, ArrayLike, InputError, PyTree
from nemo_jax.quantization.numerics import widths as widths_lib
from nemo_jax.quantization.numerics.bank import Bank
from nemo_jax.quantization.quantized import Quantized
from nemo_jax.quantization.trace import tracing
from nemo_jax.search.problem import (
  Evaluate,
  KnownObjectives,
  Prior,
  Problem,
)
from nemo_jax.tasks import objectives as objectives_lib
from nemo_jax.tasks import scoring
from nemo_jax.tasks.cost_prior import make_prior


class Data(NamedTuple):
  """Every array that an evaluation reads."""

  variables: PyTree
  bank: Bank
  inputs: PyTree  # [B, ...] each
  labels: ArrayLike  # [B] int32
  logits: ArrayLike  # [B, C] float32, of the float network
  bit_widths: ArrayLike  # [K] int32


_BY_IMAGE = PartitionSpec(devices.IMAGE)
# How the data are laid over a mesh, in the shape of the data.
_SPECS: dict[str, Any] = dict.fromkeys(Data._fields, PartitionSpec())
_SPECS |= dict.fromkeys(('inputs', 'labels', 'logits'), _BY_IMAGE)
DATA_SPECS = Data(**_SPECS)


def make_problem(
  quantized: Quantized,
  variables: PyTree,
  inputs: PyTree,
  labels: ArrayLike,
  *,
  objectives: Sequence[str] = objectives_lib.DEFAULT,
  bit_widths: Sequence[int] = widths_lib.DEFAULT,
  allowed: ArrayLike | None = None,
  data_flow: bool = False,
  images_at_once: int | None = None,
  mesh: jax.sharding.Mesh | None = None,
  sensitivities: ArrayLike | None = None,
) -> Problem:
  """The search for the bit-widths of a network's quantizers.

  Args:
    quantized: from `quantize`.
    variables: of the network.
    inputs: a pytree of arrays [B, ...], what candidates are scored on.
    labels: [B] int32.
    objectives: of `objectives.NAMES`, in the order that they come back.
    bit_widths: what there is to choose from, ascending.
    allowed: bool[N, K], what the target can run; everything if absent.
    data_flow: searchers see the graph of the data flow, not the chain.
    images_at_once: how many a candidate is shown at once; what the memory of
      the device holds if absent.
    mesh: devices that share the work, from `devices.make_mesh`.
    sensitivities: [N, K], what each width adds to the loss, from one of
      `sensitivity.METHODS`; searchers start from them and see them at the nodes
      of the graph.

  Raises:
    InputError: an objective is unknown or repeated, the bit-widths are not
      ascending whole numbers from 2 to 16, the sensitivities do not fit, or the
      network returns no logits [B, C] or such as are not finite.
  """
  objectives = objectives_lib.check(objectives)
  widths = widths_lib.check_choices(bit_widths)
  structure = quantized.structure
  count = tracing.check_arguments(variables, inputs)
  classes = structure.num_classes()
  scoring.check_labels(labels, count, classes)
  chunk = images_at_once or memory.images_at_once(structure.bytes_per_image)
  logits = scoring.float_logits(quantized, variables, inputs, chunk)
  scoring.check_finite(quantized, variables, inputs, logits)
  scoring.check_skill(logits, labels)
  if 'top5_error' in objectives and classes <= 5:
    raise InputError(f'top5_error needs over 5 classes; there are {classes}')
  shape = (len(structure.quantizers), len(widths))
  possible = np.ones(shape, bool) if allowed is None else np.asarray(allowed)
  _check_allowed(possible, shape)
  bounds = [
    objectives_lib.bounds(name, structure, classes, widths[-1])
    for name in objectives
  ]
  ideal, reference = np.asarray(bounds, np.float32).T
  graph = structure.data_flow_graph if data_flow else structure.sequential_graph
  prior = None
  if sensitivities is not None:
    prior = _prior(quantized, sensitivities, widths, objectives)
    graph = with_sensitivities(graph, np.asarray(prior.loss))
  data = Data(
    variables=variables,
    bank=quantized.bank,
    inputs=inputs,
    labels=np.asarray(labels, np.int32),
    logits=logits,
    bit_widths=np.asarray(widths, np.int32),
  )
  return Problem(
    graph=jax.tree.map(np.asarray, graph),
    data=_place(data, mesh),
    allowed=np.asarray(possible, bool),
    ideal=ideal,
    reference=reference,
    evaluate=_evaluation(quantized, objectives, widths, chunk, mesh, count),
    objective_names=objectives,
    mesh=mesh,
    data_specs=DATA_SPECS,
    prior=prior,
    known_objectives=_known(quantized, objectives, widths),
  )


def _check_allowed(allowed: np.ndarray, shape: tuple[int, int]) -> None:
  """Raises `InputError` unless every node of `shape` [N, K] has a choice."""
  if jnp.shape(allowed) != shape:
    raise InputError(
      f'allowed has shape {jnp.shape(allowed)}; quantizers and bit-widths '
      f'make it {shape}'
    )
  if not np.all(np.any(allowed, axis=1)):
    barred = np.flatnonzero(~np.any(allowed, axis=1))[0]
    raise InputError(f'allowed leaves quantizer {barred} no bit-width')


def _place(data: Data, mesh: jax.sharding.Mesh | None) -> Data:
  """The data on the devices; each takes as many images."""
  if mesh is not None:
    count, shares = len(data.labels), mesh.shape[devices.IMAGE]
    # Copies that fill up are not counted.
    rows = np.minimum(np.arange(-(-count // shares) * shares), count - 1)
    data = data._replace(
      inputs=batches.take(batches.on_host(data.inputs), rows),
      labels=data.labels[rows],
      logits=np.asarray(data.logits)[rows],
    )
  place = lambda name: devices.place(getattr(data, name), mesh, _SPECS[name])
  return Data(**{name: place(name) for name in Data._fields})


def _evaluation(
  quantized: Quantized,
  objectives: Sequence[str],
  widths: Sequence[int],
  chunk: int,
  mesh: jax.sharding.Mesh | None,
  count: int,
) -> Evaluate:
  """The evaluation of a configuration, on `count` images, `chunk` at once."""

  def evaluate(data: Data, choices: Array) -> Array:
    bits = data.bit_widths[choices]
    encoded = quantized.encode(data.variables, bits, data.bank, widths[-1])
    run = lambda part: quantized.run(data.variables, part, encoded)
    logits = memory.in_chunks(run, data.inputs, chunk)

    def performance(name):
      values = objectives_lib.performance(
        name, logits, data.labels, data.logits
      )
      # Whole before the mean, whose last digits else hang on how they were
      # divided, or what XLA adds up on the way.
      if mesh is not None:
        values = jax.lax.all_gather(values, devices.IMAGE, tiled=True)[:count]
      return jnp.mean(jax.lax.optimization_barrier(values))

    return jnp.stack(
      [
        objectives_lib.cost(name, quantized.costs, bits)
        if name in objectives_lib.COSTS
        else performance(name)
        for name in objectives
      ]
    )

  return evaluate


def _known(
  quantized: Quantized, objectives: Sequence[str], widths: Sequence[int]
) -> KnownObjectives | None:
  """All objectives but the first, if these are costs, and it is none."""
  performance, *costs = objectives
  if performance not in objectives_lib.PERFORMANCE:
    return None
  if not set(costs) <= set(objectives_lib.COSTS):
    return None

  def known_objectives(choices: Array) -> Array:
    bits = jnp.asarray(widths)[choices]
    return jnp.stack(
      [objectives_lib.cost(name, quantized.costs, bits) for name in costs]
    )

  return known_objectives


def _prior(
  quantized: Quantized,
  sensitivities: ArrayLike,
  widths: Sequence[int],
  objectives: Sequence[str],
) -> Prior:
  """The prior in 32 bits, with the costs among the objectives."""
  priced = [name for name in objectives if name in objectives_lib.COSTS]
  prior = make_prior(quantized.costs, sensitivities, widths, priced)
  narrow = lambda x: x.astype(np.int32 if x.dtype.kind == 'i' else np.float32)
  return jax.tree.map(narrow, prior)


def with_sensitivities(
  graph: jraph.GraphsTuple, loss: np.ndarray
) -> jraph.GraphsTuple:
  """The graph with the logarithms of loss [N, K] as features of its nodes.

  Their mean and deviation over all nodes are taken out, so that a network of
  any scale looks alike.
  """
  table = np.log(np.maximum(loss, 1e-9 * max(loss.max(), 1e-30)))
  table = (table - table.mean()) / max(table.std(), 1e-9)
  nodes = np.concatenate([graph.nodes, table], axis=1)
  return graph._replace(nodes=nodes.astype(np.float32))


def blind(problem: Problem) -> Problem:
  """The problem as it is without sensitivities."""
  if problem.prior is None:
    return problem
  nodes = np.asarray(problem.graph.nodes)
  features = nodes.shape[1] - problem.allowed.shape[1]
  graph = problem.graph._replace(nodes=nodes[:, :features])
  return dataclasses.replace(problem, graph=graph, prior=None)


def float_objectives(problem: Problem, images: int) -> list[float]:
  """The objectives of the float network, whose costs are 1.

  Args:
    problem: from `make_problem`.
    images: how many it was given.
  """

  def performance(data, name):
    values = objectives_lib.performance(
      name, data.logits, data.labels, data.logits
    )
    # Copies that fill up a mesh come last.
    return jnp.mean(values[:images])

  score = devices.jit(performance, problem.mesh, static_argnums=1)
  return [
    1.0 if name in objectives_lib.COSTS else float(score(problem.data, name))
    for name in problem.objective_names
  ]


def uniform(problem: Problem) -> Array:
  """int32[K, N]: the configurations with the same choice at every node."""
  nodes, choices = problem.allowed.shape
  return jnp.tile(jnp.arange(choices, dtype=jnp.int32)[:, None], (1, nodes))
