"""The prior of mixed precision: sensitivities, and costs as sums over nodes."""

from collections.abc import Sequence

import numpy as np

from nemo_jax.core.types import ArrayLike, InputError
from nemo_jax.quantization.costs import Costs
from nemo_jax.quantization.numerics.widths import FLOAT_BITS
from nemo_jax.search.problem import Prior


def _merged(pairs: np.ndarray, costs: np.ndarray):
  """The same with each pair once: costs [E, K, K, C] are added up."""
  turned = pairs[:, 0] > pairs[:, 1]
  costs = np.where(turned[:, None, None, None], np.swapaxes(costs, 1, 2), costs)
  once, place = np.unique(np.sort(pairs, axis=1), axis=0, return_inverse=True)
  total = np.zeros((len(once), *costs.shape[1:]))
  np.add.at(total, place.ravel(), costs)
  return once.astype(np.int32), total


def make_prior(
  costs: Costs,
  sensitivities: ArrayLike,
  widths: Sequence[int],
  names: Sequence[str],
) -> Prior:
  """The prior of configurations, in float64.

  Args:
    costs: from `count`.
    sensitivities: [N, K], what a quantizer adds to the loss at each width.
    widths: K bit-widths.
    names: C of NAMES.

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
    # What multiplies itself is no pair.
    own = work[same, None] * np.diagonal(joint[name])
    np.add.at(node_costs[..., i], costs.operands[same, 0], own)
  pairs, joint_costs = _merged(costs.operands[~same], pair_costs[~same])
  return Prior(loss, node_costs, pairs, joint_costs)
