"""MPQCO: the best bit-widths by sensitivities alone, within budgets.

  python -m experiments.knapsack --workload=mobilenet_v2 --data=TRAIN \
    --validation=VALIDATION --budgets=1.5MB,1.3MB,5G,1.5MB+5G

solves a multiple-choice knapsack for every budget, greedily as the paper does
and to the optimum by integer programming, and scores the greedy one on
validation images. MB are millions of bytes of the whole model, scales and
biases included; G are 10^9 bit-operations of one image, MACs x weight bits x
activation bits. With --activation_bits weights alone are chosen.
"""

import re

import numpy as np
from absl import flags

from experiments import define, estimates, options
from experiments.launch import launch
from nemo_jax.arena.baselines import mckp
from nemo_jax.core.types import InputError
from nemo_jax.quantization import costs
from nemo_jax.quantization.numerics import widths as widths_lib
from nemo_jax.tasks import mixed_precision

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(options)
flags.adopt_module_key_flags(estimates)

define.words(
  'budgets',
  ['8', '6', '4'],
  'such as 1.5MB, 5G or 1.5MB+5G; or a number of '
  'bits, which stands for what these take everywhere',
)

WIDTHS = widths_lib.DEFAULT
define.whole(
  'activation_bits',
  None,
  'of every activation; chosen if absent',
  WIDTHS[0],
  WIDTHS[-1],
)
COSTS = ('size', 'bit_operations')


def ratios(table: costs.Costs, bits: np.ndarray) -> tuple[float, float]:
  """Size and bit-operations of bits [N], without the constant part.

  Both are shares of the float network's.
  """
  size = costs.model_size(table, bits) - table.overhead_bits
  return (
    size / (widths_lib.FLOAT_BITS * table.parameters),
    costs.bit_operations(table, bits)
    / (widths_lib.FLOAT_BITS**2 * int(table.macs.sum())),
  )


def parse(word: str, table: costs.Costs) -> tuple[float, float]:
  """Budgets of size and bit-operations, as `ratios` gives them.

  Raises:
    InputError: the word is no budget.
  """
  stored = widths_lib.FLOAT_BITS * table.parameters
  work = widths_lib.FLOAT_BITS**2 * int(table.macs.sum())
  if word in map(str, WIDTHS):
    return ratios(table, np.full(len(table.elements), int(word)))
  budgets = {'MB': np.inf, 'G': np.inf}
  for part in word.split('+'):
    match = re.fullmatch(r'([0-9]{1,15}(?:\.[0-9]{0,15})?)(MB|G)', part)
    if not match or np.isfinite(budgets[match[2]]):
      raise InputError(
        f'--budgets has {word!r}; they are such as 1.5MB, 5G, 1.5MB+5G, or '
        f'numbers of bits from {WIDTHS[0]} to {WIDTHS[-1]}'
      )
    budgets[match[2]] = float(match[1])
  size = budgets['MB'] * 8e6 - table.overhead_bits
  return size / stored, budgets['G'] * 1e9 / work


def allowed(quantizers) -> np.ndarray:
  """bool[N, K]: what may be chosen, by the flags."""
  everything = np.ones((len(quantizers), len(WIDTHS)), bool)
  if FLAGS.activation_bits is None:
    return everything
  fixed = np.asarray(WIDTHS) == FLAGS.activation_bits
  active = np.asarray([not q.is_weight for q in quantizers])
  return np.where(active[:, None], fixed, everything)


def best_within(found, rows, budget) -> np.ndarray:
  """The row of a greedy front that loses least within the budget.

  Raises:
    InputError: none is within.
  """
  values = mckp.totals(found, rows)
  within = (values[:, 1:] <= np.asarray(budget) * (1 + 1e-9)).all(axis=1)
  if not within.any():
    raise InputError(
      f'nothing is as small as {list(budget)} of the float network'
    )
  return rows[np.argmin(np.where(within, values[:, 0], np.inf))]


def check() -> dict[str, tuple[float, float]]:
  """The budgets of the flags, as `parse` returns them.

  Raises:
    InputError: a flag cannot be used.
  """
  options.check()
  if FLAGS.sensitivities == 'none':
    raise InputError('--sensitivities=none leaves a knapsack nothing to weigh')
  structure = options.inspect_network()
  # Both costs are least where all bits are.
  table, lowest = structure.costs, WIDTHS[0]
  active = FLAGS.activation_bits or lowest
  bits = [lowest if q.is_weight else active for q in structure.quantizers]
  least = ratios(table, np.asarray(bits))
  budgets = {word: parse(word, table) for word in FLAGS.budgets}
  for word, budget in budgets.items():
    if any(b < x * (1 - 1e-9) for b, x in zip(budget, least, strict=True)):
      raise InputError(
        f'--budgets has {word}, and nothing is as small as that: the fewest '
        f'bits take {costs.model_size(table, bits) / 8e6:.3g}MB and '
        f'{costs.bit_operations(table, bits) / 1e9:.3g}G'
      )
  return budgets


def run() -> None:
  """The experiment."""
  budgets = check()
  workload = options.load_workload(search_images=0)
  quantized = options.quantize_workload(workload)
  sensitivities = estimates.sensitivities(workload, quantized, WIDTHS)
  known = costs.estimate(quantized.costs, sensitivities, WIDTHS, COSTS)
  found = mckp.groups(known, allowed(quantized.quantizers))
  count = len(quantized.quantizers)
  rows = mckp.front(found, count, shares=33)
  greedy, gaps = [], []
  for budget in budgets.values():
    row = best_within(found, rows, budget)
    best = mckp.optimum(found, count, budget)
    (lost, *_), (least, *_) = mckp.totals(found, np.stack([row, best]))
    greedy.append(row)
    gaps.append(f'{100 * (lost / least - 1):+.1f} %' if least > 0 else '-')
  bits = np.asarray(WIDTHS)[np.stack(greedy)]
  float_row = widths_lib.float_bits(len(quantized.quantizers))
  accuracy = scoring.accuracy(
    quantized,
    workload.variables,
    *workload.test,
    np.concatenate([[float_row], bits]),
    images_at_once=options.images_at_once(quantized),
  )
  float_top1 = 100 * accuracy[0, 0]
  print(f'\n{workload.name}: float {float_top1:.2f} %\n')
  print(
    '| budget | MB | G bit-operations | greedy over optimum | top-1 | drop |'
  )
  print('|---|---|---|---|---|---|')
  for word, row, gap, (top1, _) in zip(
    budgets, bits, gaps, accuracy[1:], strict=True
  ):
    size = costs.model_size(quantized.costs, row) / 8e6
    work = costs.bit_operations(quantized.costs, row) / 1e9
    print(
      f'| {word} | {size:.3g} | {work:.3g} | {gap} | '
      f'{100 * top1:.2f} | {float_top1 - 100 * top1:.2f} |'
    )


if __name__ == '__main__':
  launch(run)
