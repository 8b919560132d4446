"""Prior of mixed precision: sensitivities, and costs as sums over nodes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from nemo_jax.core.types import ArrayLike, InputError
from nemo_jax.quantization.costs import Costs
from nemo_jax.quantization.numerics.widths import FLOAT_BITS
from nemo_jax.search.problem import Prior


def _merged(
  pairs: Int[np.ndarray, 'E 2'], costs: Float[np.ndarray, 'E K K C']
) -> tuple[Int[np.ndarray, 'U 2'], Float[np.ndarray, 'U K K C']]:
  """Each pair once, as (lower, higher), with the sum of its costs."""
  turned = pairs[:, 0] > pairs[:, 1]
  costs = np.where(turned[:, None, None, None], np.swapaxes(costs, 1, 2), costs)
  once, place = np.unique(np.sort(pairs, axis=1), axis=0, return_inverse=True)
  total = np.zeros((len(once), *costs.shape[1:]))
  np.add.at(total, place.ravel(), costs)
  return once.astype(np.int32), total


def make_prior(
  costs: Costs,
  sensitivities: ArrayLike | Sequence[Any],
  widths: Sequence[int],
  names: Sequence[str],
) -> Prior:
  """Prior of configurations: float64 loss and costs, int32 pairs.

  Costs are ratios to the float network, without a constant part.

  Args:
    costs: from `costs.count`.
    sensitivities: [N, K], the loss that each bit-width of a quantizer adds.
    widths: K bit-widths.
    names: C of `costs.NAMES`.

  Raises:
    InputError: sensitivities have another shape, or are not finite.
  """
  loss, bits = np.asarray(sensitivities, np.float64), np.asarray(widths)
  shape = len(costs.elements), len(bits)
  if loss.shape != shape or not np.all(np.isfinite(loss)):
    raise InputError(
      f'sensitivities have shape {loss.shape}; quantizers and bit-widths make '
      f'it {shape}, and all have to be finite'
    )
  stored = np.outer(costs.elements / (FLOAT_BITS * costs.parameters), bits)
  work = costs.macs / costs.macs.sum() / FLOAT_BITS
  joint = {
    'size': np.zeros((len(bits), len(bits))),
    'bit_operations': np.outer(bits, bits) / FLOAT_BITS,
    'bit_operations_larger': np.maximum.outer(bits, bits),
  }
  node_costs = np.zeros((*shape, len(names)))
  pair_costs = np.zeros((len(work), *[len(bits)] * 2, len(names)))
  same = costs.operands[:, 0] == costs.operands[:, 1]
  for i, name in enumerate(names):
    node_costs[..., i] = stored if name == 'size' else 0
    pair_costs[..., i] = work[:, None, None] * joint[name]
    # An operand that is multiplied by itself is a node, not a pair.
    own = work[same, None] * np.diagonal(joint[name])
    np.add.at(node_costs[..., i], costs.operands[same, 0], own)
  pairs, joint_costs = _merged(costs.operands[~same], pair_costs[~same])
  return Prior(loss, node_costs, pairs, joint_costs)
