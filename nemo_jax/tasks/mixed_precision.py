"""Mixed-precision quantization as a search problem."""

import functools
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax.sharding import PartitionSpec

from nemo_jax.core import devices, memory
from nemo_jax.core.types import Array, InputError, PyTree
from nemo_jax.quantization import costs
from nemo_jax.quantization.backend.lowering import NARROW_BITS
from nemo_jax.quantization.numerics import fake_quant
from nemo_jax.quantization.numerics import ranges as calibrate
from nemo_jax.quantization.numerics.bank import Bank
from nemo_jax.quantization.trace import finite, tracing
from nemo_jax.quantization.trace.analysis import Quantizer
from nemo_jax.quantization.transform import Quantized, num_classes
from nemo_jax.search.evaluate import in_chunks
from nemo_jax.search.problem import Problem

PERFORMANCE = ('top1_error', 'top5_error', 'cross_entropy', 'divergence')
COSTS = costs.NAMES
OBJECTIVES = PERFORMANCE + COSTS
DEFAULT_OBJECTIVES = ('top1_error', 'size', 'bit_operations')
DEFAULT_BIT_WIDTHS = (2, 3, 4, 5, 6, 7, 8)
# That `accuracy` sends to the device in one block of images.
CHUNKS = 16
# Of the way from guessing to all right; less is no trained network's accuracy.
LEAST_SKILL = 0.2


class Data(NamedTuple):
  """Every array that an evaluation reads."""

  variables: PyTree
  bank: Bank
  images: Array  # [B, ...]
  labels: Array  # [B] int32
  logits: Array  # [B, C] float32, of the float network
  bit_widths: Array  # [K] int32


def in_top_k(logits: Array, labels: Array, k: int) -> Array:
  """bool[B]: whether the label is among the k best.

  A label ties with another class to its own disadvantage, and logits that are
  not finite are wrong, so that a network that says nothing scores nothing.
  """
  own = jnp.take_along_axis(logits, labels[:, None], axis=-1)
  ahead = jnp.sum(logits >= own, axis=-1) - 1
  # A label that is no class reads as NaN.
  known = jnp.isfinite(own[:, 0]) & jnp.all(jnp.isfinite(logits), axis=-1)
  return (ahead < k) & known


def _performance(name: str, logits: Array, data: Data) -> Array:
  """float32[B]: one of PERFORMANCE for every image, lower is better."""
  logits = logits.astype(jnp.float32)
  if name in ('top1_error', 'top5_error'):
    k = 1 if name == 'top1_error' else 5
    return 1.0 - in_top_k(logits, data.labels, k)
  log_probabilities = jax.nn.log_softmax(logits)
  if name == 'cross_entropy':
    picked = jnp.take_along_axis(log_probabilities, data.labels[:, None], -1)
    return -picked[:, 0]
  # Kullback-Leibler divergence of the quantized network from the float one.
  target = jax.nn.log_softmax(data.logits)
  gap = jnp.exp(target) * (target - log_probabilities)
  return jnp.sum(gap, axis=-1)


def _cost(name: str, table: costs.Costs, bits: Array) -> Array:
  """float32[]: one of COSTS, as a ratio to 32-bit floats."""
  if name == 'size':
    return costs.size_ratio(table, bits)
  precision = 'product' if name == 'bit_operations' else 'larger'
  return costs.bit_operation_ratio(table, bits, precision)


def _bounds(name, quantized, num_classes, widest) -> tuple[float, float]:
  """What an objective can at best be, and where it is worth nothing.

  Performance is worth nothing where it is that of guessing; a cost, a tenth
  above that of the widest bits everywhere.
  """
  if name in COSTS:
    bits = jnp.full(len(quantized.quantizers), widest)
    return 0.0, 1.1 * float(_cost(name, quantized.costs, bits))
  if name in ('top1_error', 'top5_error'):
    k = 1 if name == 'top1_error' else 5
    return 0.0, max(1 - k / num_classes, 0.5)
  return 0.0, float(np.log(num_classes))


def check_options(objectives: Sequence[str], bit_widths: Sequence[int]) -> None:
  """Raises `InputError` for objectives or bit-widths that cannot be used."""
  for name in objectives:
    if name not in OBJECTIVES:
      raise InputError(
        f'unknown objective {name!r}; the choices are {", ".join(OBJECTIVES)}'
      )
  if len(set(objectives)) != len(objectives) or len(objectives) < 2:
    raise InputError(
      f'objectives are {list(objectives)}; give two or more, each once'
    )
  low, high = calibrate.WIDTHS[0], calibrate.WIDTHS[-1]
  widths = tuple(bit_widths)
  known = sorted(set(range(low, high + 1)) & set(widths))
  if widths != tuple(known) or len(widths) < 2:
    raise InputError(
      f'bit-widths are {list(widths)}; give two or more whole numbers, '
      f'ascending, from {low} to {high}'
    )


def _check_labels(labels: Array, images: Array, num_classes: int) -> None:
  """Raises `InputError` unless there is a class for each image."""
  labels = np.asarray(labels)
  if labels.shape != (len(images),):
    raise InputError(
      f'labels have shape {labels.shape}; there are {len(images)} images'
    )
  if not np.issubdtype(labels.dtype, np.integer) or not (
    labels.min() >= 0 and labels.max() < num_classes
  ):
    raise InputError(
      f'labels go from {labels.min()} to {labels.max()}; classes are whole '
      f'numbers from 0 to {num_classes - 1}'
    )


def _check_finite(quantized, variables, images, logits) -> None:
  """Raises `InputError` unless the float network's logits are finite."""
  bad = np.flatnonzero(~np.isfinite(np.asarray(logits)).all(axis=1))
  if len(bad):
    image = jnp.asarray(images[bad[0] : bad[0] + 1])
    raise InputError(
      f'the float network is not finite on {len(bad)} of {len(images)} images: '
      f'{finite.culprit(quantized, variables, image)}'
    )


def _warn_if_guessing(top1: float, images: int, classes: int) -> None:
  """Warns if the float network's top-1 accuracy is near that of guessing.

  Labels in another order than the checkpoint's leave a few classes in place, so
  that it need not be as low as chance.
  """
  guess = 1 / classes
  if top1 < guess + LEAST_SKILL * (1 - guess):
    warnings.warn(
      f'the float network is right on {100 * top1:.1f} % of {images} images, '
      f'little better than guessing ({100 * guess:.1f} %): are the labels in '
      "the order of the checkpoint's classes?",
      stacklevel=3,
    )


def _check_allowed(allowed: Array, shape: tuple[int, int]) -> None:
  """Raises `InputError` unless every node of `shape` [N, K] has a choice."""
  if jnp.shape(allowed) != shape:
    raise InputError(
      f'allowed has shape {jnp.shape(allowed)}; quantizers and bit-widths '
      f'make it {shape}'
    )
  if not np.all(np.any(allowed, axis=1)):
    barred = np.flatnonzero(~np.any(allowed, axis=1))[0]
    raise InputError(f'allowed leaves quantizer {barred} no bit-width')


def make_problem(
  quantized: Quantized,
  variables: PyTree,
  images: Array,
  labels: Array,
  *,
  objectives: Sequence[str] = DEFAULT_OBJECTIVES,
  bit_widths: Sequence[int] = DEFAULT_BIT_WIDTHS,
  allowed: Array | None = None,
  data_flow: bool = False,
  images_at_once: int | None = None,
  mesh: jax.sharding.Mesh | None = None,
  sensitivities: Array | None = None,
) -> Problem:
  """The search for the bit-widths of a network's quantizers.

  Args:
    quantized: from `quantize`.
    variables: of the network.
    images: [B, ...], what candidates are scored on.
    labels: [B] int32.
    objectives: names from OBJECTIVES, in the order that they come back.
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
  check_options(objectives, bit_widths)
  widths = tuple(bit_widths)
  tracing.check_arguments(variables, images)
  if not len(images):
    raise InputError('make_problem needs at least one image')
  classes = num_classes(quantized)
  _check_labels(labels, images, classes)
  chunk = images_at_once or memory.images_at_once(quantized.bytes_per_image)
  logits = float_logits(quantized, variables, images, chunk)
  _check_finite(quantized, variables, images, logits)
  right = in_top_k(logits, jnp.asarray(labels, jnp.int32), 1)
  _warn_if_guessing(float(jnp.mean(right)), len(images), classes)
  by_image = PartitionSpec(devices.IMAGE)
  specs = Data(*[PartitionSpec()] * len(Data._fields))._replace(
    images=by_image, labels=by_image, logits=by_image
  )
  data = Data(
    variables=variables,
    bank=quantized.bank,
    images=images,
    labels=np.asarray(labels, np.int32),
    logits=logits,
    bit_widths=np.asarray(widths, np.int32),
  )
  count = len(images)
  if mesh is not None:
    # Every device takes as many images; copies that fill up are not counted.
    shares = mesh.shape[devices.IMAGE]
    rows = np.minimum(np.arange(-(-count // shares) * shares), count - 1)
    data = data._replace(
      images=np.asarray(images)[rows],
      labels=data.labels[rows],
      logits=np.asarray(logits)[rows],
    )
  placed = zip(data, specs, strict=True)
  data = Data(*(devices.place(part, mesh, spec) for part, spec in placed))
  if 'top5_error' in objectives and classes <= 5:
    raise InputError(f'top5_error needs over 5 classes; there are {classes}')
  bounds = [_bounds(o, quantized, classes, widths[-1]) for o in objectives]

  def evaluate(data: Data, choices: Array) -> Array:
    bits = data.bit_widths[choices]
    encoded = quantized.encode(data.variables, bits, data.bank, widths[-1])
    run = lambda images: quantized.run(data.variables, images, encoded)
    logits = in_chunks(run, data.images, chunk)

    def performance(name):
      values = _performance(name, logits, data)
      # Whole before the mean, whose last digits else hang on how they were
      # divided, or what XLA adds up on the way.
      if mesh is not None:
        values = jax.lax.all_gather(values, devices.IMAGE, tiled=True)[:count]
      return jnp.mean(jax.lax.optimization_barrier(values))

    return jnp.stack(
      [
        _cost(name, quantized.costs, bits)
        if name in COSTS
        else performance(name)
        for name in objectives
      ]
    )

  def exact(choices: Array) -> Array:
    bits = jnp.asarray(widths)[choices]
    rest = objectives[1:]
    return jnp.stack([_cost(name, quantized.costs, bits) for name in rest])

  shape = (len(quantized.quantizers), len(widths))
  allowed = np.ones(shape, bool) if allowed is None else allowed
  _check_allowed(allowed, shape)
  graph = quantized.data_flow_graph if data_flow else quantized.sequential_graph
  known = None
  if sensitivities is not None:
    priced = [name for name in objectives if name in COSTS]
    known = costs.estimate(quantized.costs, sensitivities, widths, priced)
    narrow = lambda x: x.astype(np.int32 if x.dtype.kind == 'i' else np.float32)
    known = jax.tree.map(narrow, known)
    graph = with_sensitivities(graph, known.loss)
  only_costs = set(objectives[1:]) <= set(COSTS)
  ideal, reference = np.asarray(bounds, np.float32).T
  return Problem(
    graph=jax.tree.map(np.asarray, graph),
    data=data,
    allowed=np.asarray(allowed, bool),
    ideal=ideal,
    reference=reference,
    evaluate=evaluate,
    objective_names=tuple(objectives),
    mesh=mesh,
    data_specs=specs,
    estimate=known,
    costs=exact if objectives[0] in PERFORMANCE and only_costs else None,
  )


def with_sensitivities(graph, loss: np.ndarray):
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
  if problem.estimate is None:
    return problem
  features = problem.graph.nodes.shape[1] - problem.allowed.shape[1]
  graph = problem.graph._replace(nodes=problem.graph.nodes[:, :features])
  return problem.replace(graph=graph, estimate=None)


def float_bits(quantizers: Sequence[Quantizer]) -> np.ndarray:
  """int32[N]: more bits than any quantizer has, which switches them off."""
  return np.full(len(quantizers), calibrate.WIDTHS[-1] + 1, np.int32)


def float_logits(
  quantized: Quantized, variables: PyTree, images: Array, images_at_once: int
) -> Array:
  """float32[B, C]: what the network says in float."""

  @jax.jit
  def logits(variables, images):
    run = lambda images: quantized.intercept(variables, images)
    return in_chunks(run, images, images_at_once)

  return logits(variables, jnp.asarray(images)).astype(jnp.float32)


def float_objectives(problem: Problem, images: int) -> list[float]:
  """The objectives of the float network, whose costs are 1.

  Args:
    problem: from `make_problem`.
    images: how many it was given.
  """

  def performance(data, name):
    # Copies that fill up a mesh come last.
    return jnp.mean(_performance(name, data.logits, data)[:images])

  score = devices.jit(performance, problem.mesh, static_argnums=1)
  return [
    1.0 if name in COSTS else float(score(problem.data, name))
    for name in problem.objective_names
  ]


def uniform(problem: Problem) -> Array:
  """int32[K, N]: the configurations with the same choice at every node."""
  nodes, choices = problem.allowed.shape
  return jnp.tile(jnp.arange(choices, dtype=jnp.int32)[:, None], (1, nodes))


def _max_bits(bits: np.ndarray) -> int | None:
  """The promise that can be made of bits, in few steps: each is a program."""
  return NARROW_BITS if np.max(bits) <= NARROW_BITS else None


def accuracy(
  quantized: Quantized,
  variables: PyTree,
  images: np.ndarray,
  labels: np.ndarray,
  bits: np.ndarray,
  *,
  images_at_once: int | None = None,
  mesh: jax.sharding.Mesh | None = None,
) -> np.ndarray:
  """float32[P, 2]: top-1 and top-5 accuracy of configurations.

  Images may be more than the device holds: they come to it block by block.

  Args:
    quantized: from `quantize`.
    variables: of the network.
    images: [B, ...].
    labels: [B] int.
    bits: [P, N] int32; `float_bits` for the float network.
    images_at_once: as for `make_problem`.
    mesh: devices that share the images.

  Raises:
    InputError: there is not a class for each image, or the network returns no
      logits.
  """
  chunk = images_at_once or memory.images_at_once(quantized.bytes_per_image)

  def hits(max_bits, variables, bank, images, labels, bits):
    encoded = quantized.encode(variables, bits, bank, max_bits)
    run = lambda images: quantized.run(variables, images, encoded)
    logits = in_chunks(run, images, chunk).astype(jnp.float32)
    return jnp.stack([in_top_k(logits, labels, k) for k in (1, 5)], axis=1)

  whole, by_image = PartitionSpec(), PartitionSpec(mesh and mesh.axis_names)

  @functools.cache
  def program(max_bits):
    score = functools.partial(hits, max_bits)
    if mesh is not None:
      score = jax.shard_map(
        score,
        mesh=mesh,
        in_specs=(whole, whole, by_image, by_image, whole),
        out_specs=by_image,
        check_vma=False,
      )
    return devices.jit(score, mesh)

  tracing.check_arguments(variables, images)
  classes = num_classes(quantized)
  _check_labels(labels, images, classes)
  count = len(quantized.quantizers)
  bits = np.stack([fake_quant.check_bits(row, count) for row in bits])
  own = devices.place((variables, quantized.bank), mesh, whole)
  shares = mesh.size if mesh is not None else 1
  counts = np.zeros((len(bits), 2), np.int64)
  with tqdm.tqdm(
    total=len(bits) * len(images),
    desc='scoring',
    unit='image',
    disable=None,
  ) as bar:
    block = shares * min(CHUNKS * chunk, -(-len(images) // shares))
    for start in range(0, len(images), block):
      count = min(block, len(images) - start)
      # The last block is filled up, so that one program serves all.
      rows = np.minimum(np.arange(start, start + block), len(images) - 1)
      part = devices.place((images[rows], labels[rows]), mesh, by_image)
      for i, row in enumerate(bits):
        right = program(_max_bits(row))(*own, *part, row)
        counts[i] += np.asarray(right)[:count].sum(axis=0)
        bar.update(count)
  found = (counts / len(images)).astype(np.float32)
  is_float = np.all(np.asarray(bits) > calibrate.WIDTHS[-1], axis=1)
  for top1 in found[is_float, 0]:
    _warn_if_guessing(float(top1), len(images), classes)
  return found
