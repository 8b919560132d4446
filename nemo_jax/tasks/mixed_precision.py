"""Mixed-precision quantization of a network as a search problem."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jraph
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Bool, Float, Int

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
  inputs: PyTree  # arrays [B, ...]
  labels: Int[ArrayLike, ' B']  # int32
  logits: Float[ArrayLike, 'B C']  # float32, of the float network
  bit_widths: Int[ArrayLike, ' K']  # int32


_BY_IMAGE = PartitionSpec(devices.IMAGE)
# How each field of `Data` is divided over a mesh.
_SPECS: dict[str, Any] = dict.fromkeys(Data._fields, PartitionSpec())
_SPECS |= dict.fromkeys(('inputs', 'labels', 'logits'), _BY_IMAGE)
DATA_SPECS = Data(**_SPECS)


def make_problem(
  quantized: Quantized,
  variables: PyTree,
  inputs: PyTree,
  labels: ArrayLike | Sequence[Any],
  *,
  objectives: Sequence[str] = objectives_lib.DEFAULT,
  bit_widths: Sequence[int] = widths_lib.DEFAULT,
  allowed: ArrayLike | Sequence[Any] | None = None,
  data_flow: bool = False,
  images_at_once: int | None = None,
  mesh: jax.sharding.Mesh | None = None,
  sensitivities: ArrayLike | Sequence[Any] | None = None,
) -> Problem:
  """Search problem over the bit-widths of a network's N quantizers.

  A warning tells of a float network that is little better than guessing.

  Args:
    quantized: from `quantize`.
    variables: of the network.
    inputs: a pytree of arrays [B, ...], on which candidates are scored.
    labels: [B] integers, classes from 0.
    objectives: M of `objectives.NAMES`, in the order of the results.
    bit_widths: K bit-widths to choose from, ascending.
    allowed: bool[N, K], the choices that the target can run; all if None.
    data_flow: the graph of the problem is the data flow between quantizers,
      rather than a chain in their order.
    images_at_once: how many images a candidate is run on at once; as many as
      fit the memory of the device if None.
    mesh: devices that share the work, from `devices.make_mesh`.
    sensitivities: [N, K], the loss that each bit-width of a quantizer adds,
      from one of `sensitivity.METHODS`. They make the prior, and are features
      of the graph's nodes.

  Raises:
    InputError: an objective is unknown or repeated; the bit-widths are not
      ascending whole numbers from 2 to 16; labels, `allowed` or sensitivities
      do not fit; or the network returns no finite logits [B, C].
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
  scoring.check_skill(logits, labels, stacklevel=2)
  if 'top5_error' in objectives and classes <= 5:
    raise InputError(f'top5_error needs over 5 classes; there are {classes}')
  possible = _possible(allowed, (len(structure.quantizers), len(widths)))
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
    allowed=possible,
    ideal=ideal,
    reference=reference,
    evaluate=_evaluation(quantized, objectives, widths, chunk, mesh, count),
    objective_names=objectives,
    mesh=mesh,
    data_specs=DATA_SPECS,
    prior=prior,
    known_objectives=_known(quantized, objectives, widths),
  )


def _possible(
  allowed: ArrayLike | Sequence[Any] | None, shape: tuple[int, int]
) -> Bool[np.ndarray, 'N K']:
  """The choices that `allowed` names, of `shape` [N, K]; all if it is None.

  Raises:
    InputError: it has another shape, or a quantizer has no choice.
  """
  if allowed is None:
    return np.ones(shape, bool)
  allowed = np.asarray(allowed)
  if jnp.shape(allowed) != shape:
    raise InputError(
      f'allowed has shape {jnp.shape(allowed)}; quantizers and bit-widths '
      f'make it {shape}'
    )
  if not np.all(np.any(allowed, axis=1)):
    barred = np.flatnonzero(~np.any(allowed, axis=1))[0]
    raise InputError(f'allowed leaves quantizer {barred} no bit-width')
  return np.asarray(allowed, bool)


def _place(data: Data, mesh: jax.sharding.Mesh | None) -> Data:
  """The data on the devices of a mesh, with as many images on each."""
  if mesh is not None:
    count, shares = len(data.labels), mesh.shape[devices.IMAGE]
    # Copies of the last image make the count even; means leave them out.
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
  """`Problem.evaluate`: objectives on `count` images, `chunk` at once."""

  def evaluate(data: Data, choices: Int[Array, ' N']) -> Float[Array, ' M']:
    bits = data.bit_widths[choices]
    encoded = quantized.encode(data.variables, bits, data.bank, widths[-1])
    run = lambda part: quantized.run(data.variables, part, encoded)
    logits = memory.in_chunks(run, data.inputs, chunk)

    def performance(name: str) -> Float[Array, '']:
      values = objectives_lib.performance(
        name, logits, data.labels, data.logits
      )
      # All values are gathered before the mean, and the barrier keeps XLA from
      # fusing it: the order of the sum, and with it the last digits, must not
      # depend on the number of devices.
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
  """`Problem.known_objectives`; None unless the first alone is no cost."""
  performance, *costs = objectives
  if performance not in objectives_lib.PERFORMANCE:
    return None
  if not set(costs) <= set(objectives_lib.COSTS):
    return None

  def known_objectives(choices: Int[Array, ' N']) -> Float[Array, ' m']:
    bits = jnp.asarray(widths)[choices]
    return jnp.stack(
      [objectives_lib.cost(name, quantized.costs, bits) for name in costs]
    )

  return known_objectives


def _prior(
  quantized: Quantized,
  sensitivities: ArrayLike | Sequence[Any],
  widths: Sequence[int],
  objectives: Sequence[str],
) -> Prior:
  """Prior with the costs among the objectives, its numbers in 32 bits."""
  priced = [name for name in objectives if name in objectives_lib.COSTS]
  prior = make_prior(quantized.costs, sensitivities, widths, priced)
  narrow = lambda x: x.astype(np.int32 if x.dtype.kind == 'i' else np.float32)
  return jax.tree.map(narrow, prior)


def with_sensitivities(
  graph: jraph.GraphsTuple, loss: Float[np.ndarray, 'N K']
) -> jraph.GraphsTuple:
  """The graph with the logarithms of the losses as K more node features.

  The logarithms are standardized over all nodes and bit-widths, so that they
  do not depend on the scale of the network's loss.
  """
  table = np.log(np.maximum(loss, 1e-9 * max(loss.max(), 1e-30)))
  table = (table - table.mean()) / max(table.std(), 1e-9)
  nodes = np.concatenate([graph.nodes, table], axis=1)
  return graph._replace(nodes=nodes.astype(np.float32))


def blind(problem: Problem) -> Problem:
  """The problem without sensitivities: without prior and their features."""
  if problem.prior is None:
    return problem
  nodes = np.asarray(problem.graph.nodes)
  features = nodes.shape[1] - problem.allowed.shape[1]
  graph = problem.graph._replace(nodes=nodes[:, :features])
  return dataclasses.replace(problem, graph=graph, prior=None)


def float_objectives(problem: Problem, images: int) -> list[float]:
  """M objectives of the float network, whose costs are 1.

  Args:
    problem: from `make_problem`.
    images: how many images it was made with.
  """

  def performance(data: Data, name: str) -> Float[Array, '']:
    values = objectives_lib.performance(
      name, data.logits, data.labels, data.logits
    )
    # Copies that make the count even on a mesh come last.
    return jnp.mean(values[:images])

  score = devices.jit(performance, problem.mesh, static_argnums=1)
  return [
    1.0 if name in objectives_lib.COSTS else float(score(problem.data, name))
    for name in problem.objective_names
  ]


def uniform(problem: Problem) -> Int[Array, 'K N']:
  """The K configurations with the same choice at every node, int32."""
  nodes, choices = problem.allowed.shape
  return jnp.tile(jnp.arange(choices, dtype=jnp.int32)[:, None], (1, nodes))
