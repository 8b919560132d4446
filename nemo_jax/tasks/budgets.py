"""Budgets of model size and BitOps, and the configurations within them."""

import re
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Int

from nemo_jax.core.types import ArrayLike, InputError
from nemo_jax.quantization import costs
from nemo_jax.quantization.numerics.widths import DEFAULT, FLOAT_BITS
from nemo_jax.quantization.structure import Structure
from nemo_jax.search import knapsack

# The costs that a budget limits, in this order.
COSTS = ('size', 'bit_operations')


def ratios(
  table: costs.Costs, bits: Int[ArrayLike, ' N']
) -> tuple[float, float]:
  """Model size and BitOps of a configuration, as ratios to the float network.

  The size leaves out what no bit-width changes (`Costs.overhead_bits`).

  Args:
    table: costs of the network.
    bits: bit-width of each quantizer.
  """
  size = costs.model_size(table, bits) - table.overhead_bits
  return (
    size / (FLOAT_BITS * table.parameters),
    costs.bit_operations(table, bits) / (FLOAT_BITS**2 * int(table.macs.sum())),
  )


def parse(
  word: str, table: costs.Costs, bit_widths: Sequence[int] = DEFAULT
) -> tuple[float, float]:
  """Budgets of model size and BitOps, in the units of `ratios`.

  A cost that the word does not limit has the budget inf.

  Args:
    word: such as `1.5MB`, `5G` or `1.5MB+5G`; MB are millions of bytes of the
      whole model, G are 10^9 BitOps of one input. Or a bit-width, which stands
      for the costs of this bit-width at every quantizer.
    table: costs of the network.
    bit_widths: the bit-widths that the word may be.

  Raises:
    InputError: the word is no budget.
  """
  if word in map(str, bit_widths):
    return ratios(table, np.full(len(table.elements), int(word)))
  budgets = {'MB': np.inf, 'G': np.inf}
  for part in word.split('+'):
    match = re.fullmatch(r'([0-9]{1,15}(?:\.[0-9]{0,15})?)(MB|G)', part)
    if not match or np.isfinite(budgets[match[2]]):
      raise InputError(
        f'{word!r} is no budget; they are such as 1.5MB, 5G, 1.5MB+5G, or '
        f'numbers of bits from {bit_widths[0]} to {bit_widths[-1]}'
      )
    budgets[match[2]] = float(match[1])
  size = budgets['MB'] * 8e6 - table.overhead_bits
  work = FLOAT_BITS**2 * int(table.macs.sum())
  return size / (FLOAT_BITS * table.parameters), budgets['G'] * 1e9 / work


def check(
  budgets: Mapping[str, Sequence[float]],
  structure: Structure,
  activation_bits: int | None = None,
  lowest: int = DEFAULT[0],
) -> None:
  """Raises `InputError` for a budget below the costs of all configurations.

  Args:
    budgets: from `parse`, by the word that each was parsed from.
    structure: of the network.
    activation_bits: bit-width of every activation; None if they are chosen.
    lowest: the smallest bit-width.
  """
  active = activation_bits or lowest
  bits = [lowest if q.is_weight else active for q in structure.quantizers]
  # Both costs grow with every bit-width.
  least = ratios(structure.costs, np.asarray(bits))
  for word, budget in budgets.items():
    if any(b < x * (1 - 1e-9) for b, x in zip(budget, least, strict=True)):
      raise InputError(
        f'{word} is too little: the fewest bits take '
        f'{costs.model_size(structure.costs, bits) / 8e6:.3g}MB and '
        f'{costs.bit_operations(structure.costs, bits) / 1e9:.3g}G'
      )


def allowed(
  is_weight: Sequence[bool],
  bit_widths: Sequence[int],
  activation_bits: int | None = None,
) -> Bool[np.ndarray, 'N K']:
  """The bit-widths that each quantizer may have.

  Args:
    is_weight: N flags; the other quantizers are of activations.
    bit_widths: K of them.
    activation_bits: the only bit-width of every activation; None allows all.
  """
  everything = np.ones((len(is_weight), len(bit_widths)), bool)
  if activation_bits is None:
    return everything
  fixed = np.asarray(bit_widths) == activation_bits
  return np.where(np.asarray(is_weight)[:, None], everything, fixed)


def best_within(
  groups: Sequence[knapsack.Group],
  rows: Int[np.ndarray, 'P N'],
  budget: Sequence[float],
) -> Int[np.ndarray, ' N']:
  """The configuration of a greedy front with the least loss within a budget.

  Args:
    groups: from `knapsack.groups`.
    rows: configurations, from `knapsack.front`.
    budget: from `parse`.

  Raises:
    InputError: no configuration is within the budget.
  """
  values = knapsack.totals(groups, rows)
  within = (values[:, 1:] <= np.asarray(budget) * (1 + 1e-9)).all(axis=1)
  if not within.any():
    raise InputError(
      f'nothing is as small as {list(budget)} of the float network'
    )
  return rows[np.argmin(np.where(within, values[:, 0], np.inf))]
