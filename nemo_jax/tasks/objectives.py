"""Objectives of mixed precision: performance on images, and known costs."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from nemo_jax.core.types import Array, ArrayLike, InputError
from nemo_jax.quantization import costs
from nemo_jax.quantization.structure import Structure

PERFORMANCE = ('top1_error', 'top5_error', 'cross_entropy', 'divergence')
COSTS = costs.NAMES
NAMES = PERFORMANCE + COSTS
DEFAULT = ('top1_error', 'size', 'bit_operations')


def check(objectives: Sequence[str]) -> tuple[str, ...]:
  """The names of the objectives.

  Raises:
    InputError: there are fewer than two, or one is unknown or there twice.
  """
  for name in objectives:
    if name not in NAMES:
      raise InputError(
        f'unknown objective {name!r}; the choices are {", ".join(NAMES)}'
      )
  if len(set(objectives)) != len(objectives) or len(objectives) < 2:
    raise InputError(
      f'objectives are {list(objectives)}; give two or more, each once'
    )
  return tuple(objectives)


def in_top_k(logits: Array, labels: ArrayLike, k: int) -> Array:
  """bool[B]: whether the label is among the k best.

  A label ties with another class to its own disadvantage, and logits that are
  not finite are wrong, so that a network that says nothing scores nothing.

  Args:
    logits: [B, C].
    labels: int32[B].
    k: of how many.
  """
  own = jnp.take_along_axis(logits, labels[:, None], axis=-1)
  ahead = jnp.sum(logits >= own, axis=-1) - 1
  # A label that is no class reads as NaN.
  known = jnp.isfinite(own[:, 0]) & jnp.all(jnp.isfinite(logits), axis=-1)
  return (ahead < k) & known


def performance(
  name: str, logits: Array, labels: ArrayLike, float_logits: ArrayLike
) -> Array:
  """float32[B]: an objective for every image, lower is better.

  Args:
    name: one of PERFORMANCE.
    logits: [B, C], of the quantized network.
    labels: int32[B].
    float_logits: [B, C], of the float network.
  """
  logits = logits.astype(jnp.float32)
  if name in ('top1_error', 'top5_error'):
    k = 1 if name == 'top1_error' else 5
    return 1.0 - in_top_k(logits, labels, k)
  log_probabilities = jax.nn.log_softmax(logits)
  if name == 'cross_entropy':
    return -jnp.take_along_axis(log_probabilities, labels[:, None], -1)[:, 0]
  # Kullback-Leibler divergence of the quantized network from the float one.
  target = jax.nn.log_softmax(float_logits)
  gap = jnp.exp(target) * (target - log_probabilities)
  return jnp.sum(gap, axis=-1)


def cost(name: str, table: costs.Costs, bits: Array) -> Array:
  """float32[]: one of COSTS, as a ratio to 32-bit floats; bits are int32[N]."""
  if name == 'size':
    return costs.size_ratio(table, bits)
  precision = 'product' if name == 'bit_operations' else 'larger'
  return costs.bit_operation_ratio(table, bits, precision)


def bounds(
  name: str, structure: Structure, classes: int, widest: int
) -> tuple[float, float]:
  """What an objective can at best be, and where it is worth nothing.

  Performance is worth nothing where it is that of guessing; a cost, a tenth
  above that of the widest bits everywhere.
  """
  if name in COSTS:
    bits = jnp.full(len(structure.quantizers), widest)
    return 0.0, 1.1 * float(cost(name, structure.costs, bits))
  if name in ('top1_error', 'top5_error'):
    k = 1 if name == 'top1_error' else 5
    return 0.0, max(1 - k / classes, 0.5)
  return 0.0, float(np.log(classes))
