"""Mixed-precision quantization as a search problem."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from nemo_jax.base import Array, InputError, Problem, PyTree
from nemo_jax.quantization import calibrate, costs
from nemo_jax.quantization.transform import Quantized

PERFORMANCE = ('top1_error', 'top5_error', 'cross_entropy', 'divergence')
COSTS = ('size', 'bit_operations', 'bit_operations_larger')
OBJECTIVES = PERFORMANCE + COSTS
DEFAULT_OBJECTIVES = ('top1_error', 'size', 'bit_operations')
DEFAULT_BIT_WIDTHS = (2, 3, 4, 5, 6, 7, 8)


class Data(NamedTuple):
  """Every array that an evaluation reads."""

  variables: PyTree
  ranges: tuple[calibrate.Range, ...]
  images: Array  # [B, ...]
  labels: Array  # [B] int32
  logits: Array  # [B, C] float32, of the float network
  bit_widths: Array  # [K] int32


def topk_error(logits: Array, labels: Array, k: int) -> Array:
  """float32[]: share of the images whose label is not among the k best.

  A label ties with another class to its own disadvantage, and logits that are
  not finite are wrong, so that a network that says nothing scores nothing.
  """
  own = jnp.take_along_axis(logits, labels[:, None], axis=-1)
  ahead = jnp.sum(logits >= own, axis=-1) - 1
  # A label that is no class reads as NaN.
  known = jnp.isfinite(own) & jnp.all(jnp.isfinite(logits), axis=-1)
  wrong = (ahead >= k) | ~known
  return jnp.mean(wrong, dtype=jnp.float32)


def _performance(name: str, logits: Array, data: Data) -> Array:
  """float32[]: one of PERFORMANCE, lower is better."""
  logits = logits.astype(jnp.float32)
  if name == 'top1_error':
    return topk_error(logits, data.labels, 1)
  if name == 'top5_error':
    return topk_error(logits, data.labels, 5)
  log_probabilities = jax.nn.log_softmax(logits)
  if name == 'cross_entropy':
    picked = jnp.take_along_axis(log_probabilities, data.labels[:, None], -1)
    return -jnp.mean(picked)
  # Kullback-Leibler divergence of the quantized network from the float one.
  target = jax.nn.log_softmax(data.logits)
  gap = jnp.exp(target) * (target - log_probabilities)
  return jnp.mean(jnp.sum(gap, axis=-1))


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

  Raises:
    InputError: an objective is unknown or repeated, or the bit-widths are not
      ascending whole numbers from 2 to 16.
  """
  check_options(objectives, bit_widths)
  widths = tuple(bit_widths)
  if not len(images):
    raise InputError('make_problem needs at least one image')
  images = jnp.asarray(images)
  data = Data(
    variables=jax.tree.map(jnp.asarray, variables),
    ranges=quantized.ranges,
    images=images,
    labels=jnp.asarray(labels, jnp.int32),
    logits=float_logits(quantized, variables, images),
    bit_widths=jnp.asarray(widths, jnp.int32),
  )
  classes = data.logits.shape[-1]
  _check_labels(labels, images, classes)
  if 'top5_error' in objectives and classes <= 5:
    raise InputError(f'top5_error needs over 5 classes; there are {classes}')
  bounds = [_bounds(o, quantized, classes, widths[-1]) for o in objectives]

  def evaluate(data: Data, choices: Array) -> Array:
    bits = data.bit_widths[choices]
    logits = quantized.apply(data.variables, data.images, bits, data.ranges)
    return jnp.stack(
      [
        _cost(name, quantized.costs, bits)
        if name in COSTS
        else _performance(name, logits, data)
        for name in objectives
      ]
    )

  shape = (len(quantized.quantizers), len(widths))
  allowed = np.ones(shape, bool) if allowed is None else allowed
  _check_allowed(allowed, shape)
  graph = quantized.data_flow_graph if data_flow else quantized.sequential_graph
  ideal, reference = np.asarray(bounds, np.float32).T
  return Problem(
    graph=jax.tree.map(jnp.asarray, graph),
    data=data,
    allowed=jnp.asarray(allowed, bool),
    ideal=jnp.asarray(ideal),
    reference=jnp.asarray(reference),
    evaluate=evaluate,
    objective_names=tuple(objectives),
  )


def float_logits(quantized: Quantized, variables: PyTree, images: Array):
  """float32[B, C]: what the network says at more bits than any quantizer."""
  bits = jnp.full(len(quantized.quantizers), calibrate.WIDTHS[-1] + 1)
  logits = jax.jit(quantized.apply)(variables, images, bits)
  return logits.astype(jnp.float32)


def float_point(problem: Problem, apply, images: Array, labels: Array) -> dict:
  """The float network beside the points of a front: its objectives, accuracy.

  Args:
    problem: from `make_problem`.
    apply: (variables, images) -> logits, unquantized.
    images: [B, ...], the images that accuracy is reported on.
    labels: [B] int32.
  """
  data = problem.data
  objectives = [
    1.0 if name in COSTS else _performance(name, data.logits, data)
    for name in problem.objective_names
  ]
  logits = jax.jit(apply)(data.variables, images)
  error = topk_error(logits, jnp.asarray(labels), 1)
  return {'objectives': objectives, 'test_accuracy': 1 - error}


def uniform(problem: Problem) -> Array:
  """int32[K, N]: the configurations with the same choice at every node."""
  nodes, choices = problem.allowed.shape
  return jnp.tile(jnp.arange(choices, dtype=jnp.int32)[:, None], (1, nodes))


def accuracy(
  quantized: Quantized,
  problem: Problem,
  images: Array,
  labels: Array,
  choices: Array,
) -> np.ndarray:
  """float32[P]: top-1 accuracy of configurations on other images.

  Args:
    quantized: from `quantize`.
    problem: from `make_problem`, for the variables, ranges and bit-widths.
    images: [B, ...].
    labels: [B] int32.
    choices: [P, N] int32.
  """
  _check_labels(labels, images, problem.data.logits.shape[-1])
  data = problem.data._replace(images=images, labels=labels)

  @jax.jit
  def score(data, choices):
    bits = data.bit_widths[choices]
    logits = quantized.apply(data.variables, data.images, bits, data.ranges)
    return 1 - topk_error(logits, data.labels, 1)

  bar = tqdm.tqdm(choices, desc='scoring the front', disable=None)
  return np.asarray([score(data, row) for row in bar], np.float32)
