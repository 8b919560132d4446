"""Objectives of mixed precision: performance on images, and exact costs."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from nemo_jax.core.types import Array, ArrayLike, InputError
from nemo_jax.quantization import costs
from nemo_jax.quantization.structure import Structure

PERFORMANCE = ('top1_error', 'top5_error', 'cross_entropy', 'divergence')
COSTS = costs.NAMES
NAMES = PERFORMANCE + COSTS
DEFAULT = ('top1_error', 'size', 'bit_operations')


def check(objectives: Sequence[str]) -> tuple[str, ...]:
  """The names of the objectives as a tuple, checked.

  Raises:
    InputError: there are fewer than two, or one is unknown or repeated.
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


def in_top_k(
  logits: Float[Array, 'B C'], labels: Int[ArrayLike, ' B'], k: int
) -> Bool[Array, ' B']:
  """Whether the label of each image is among its k largest logits.

  A label whose logit equals that of another class ranks behind it, and an image
  with a logit that is not finite counts as wrong: a network with constant or
  broken logits has accuracy 0.

  Args:
    logits: of C classes.
    labels: classes from 0.
    k: number of logits that count as right.
  """
  own = jnp.take_along_axis(logits, labels[:, None], axis=-1)
  ahead = jnp.sum(logits >= own, axis=-1) - 1
  # `take_along_axis` gives NaN for a label that is no class.
  known = jnp.isfinite(own[:, 0]) & jnp.all(jnp.isfinite(logits), axis=-1)
  return (ahead < k) & known


def performance(
  name: str,
  logits: Float[ArrayLike, 'B C'],
  labels: Int[ArrayLike, ' B'],
  float_logits: Float[ArrayLike, 'B C'],
) -> Float[Array, ' B']:
  """A performance objective of every image, lower is better.

  Errors are 0 or 1; cross-entropy and divergence are in nats. The divergence is
  that of Kullback and Leibler, of the quantized network from the float one.

  Args:
    name: one of PERFORMANCE.
    logits: of the quantized network.
    labels: classes from 0.
    float_logits: of the float network.
  """
  logits = jnp.asarray(logits, jnp.float32)
  if name in ('top1_error', 'top5_error'):
    k = 1 if name == 'top1_error' else 5
    return 1.0 - in_top_k(logits, labels, k)
  log_probabilities = jax.nn.log_softmax(logits)
  if name == 'cross_entropy':
    return -jnp.take_along_axis(log_probabilities, labels[:, None], -1)[:, 0]
  target = jax.nn.log_softmax(float_logits)
  gap = jnp.exp(target) * (target - log_probabilities)
  return jnp.sum(gap, axis=-1)


def cost(
  name: str, table: costs.Costs, bits: Int[ArrayLike, ' N']
) -> Float[Array, '']:
  """A cost of a configuration, as a ratio to the network in 32-bit floats.

  Args:
    name: one of COSTS.
    table: costs of the network.
    bits: bit-width of each quantizer.
  """
  if name == 'size':
    return costs.size_ratio(table, bits)
  precision = 'product' if name == 'bit_operations' else 'larger'
  return costs.bit_operation_ratio(table, bits, precision)


def bounds(
  name: str, structure: Structure, classes: int, widest: int
) -> tuple[float, float]:
  """Coordinates of the ideal and of the reference point in one objective.

  The ideal is 0. The reference of a performance objective is its value for
  guessing, but at least 0.5 for an error; that of a cost is 1.1 times the cost
  of the widest bit-width at every quantizer.

  Args:
    name: one of NAMES.
    structure: of the network.
    classes: number of classes.
    widest: the largest bit-width.
  """
  if name in COSTS:
    bits = jnp.full(len(structure.quantizers), widest)
    return 0.0, 1.1 * float(cost(name, structure.costs, bits))
  if name in ('top1_error', 'top5_error'):
    k = 1 if name == 'top1_error' else 5
    return 0.0, max(1 - k / classes, 0.5)
  return 0.0, float(np.log(classes))
