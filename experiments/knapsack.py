"""MPQCO: the best bit-widths by their sensitivities, within budgets.

  python -m experiments.knapsack --workload=mobilenet_v2 --data=TRAIN \
    --validation=VALIDATION --budgets=1.5MB,1.3MB,5G,1.5MB+5G

solves a multiple-choice knapsack for every budget, greedily as in the paper and
exactly by integer programming. The greedy solution is scored on the test
images. MB are millions of bytes of the whole model, with scales and biases; G
are 10^9 BitOps of one image, which are MACs x weight bits x activation bits.
With --activation_bits only the bit-widths of weights are chosen.
"""

import numpy as np
from absl import flags as absl_flags

from experiments import define, flags
from experiments.launch import launch
from nemo_jax import pipeline, workloads
from nemo_jax.config import Config
from nemo_jax.core.types import InputError
from nemo_jax.quantization import costs
from nemo_jax.quantization.numerics import widths
from nemo_jax.search import knapsack
from nemo_jax.tasks import budgets as budgets_lib
from nemo_jax.tasks import scoring
from nemo_jax.tasks.cost_prior import make_prior

absl_flags.adopt_module_key_flags(flags)

WIDTHS = widths.DEFAULT
define.words(
  'budgets',
  ['8', '6', '4'],
  'budgets such as 1.5MB, 5G or 1.5MB+5G; or a bit-width, which stands for '
  'its costs at all quantizers',
)
define.whole(
  'activation_bits',
  None,
  'bit-width of every activation; chosen if absent',
  WIDTHS[0],
  WIDTHS[-1],
)


def check() -> tuple[Config, dict[str, tuple[float, float]]]:
  """The config, and the budgets of the flags from `budgets.parse`.

  Raises:
    InputError: a flag cannot be used.
  """
  flags.check_sources()
  own, config = define.own(__name__), flags.config()
  if config.sensitivities == 'none':
    raise InputError('--sensitivities=none: a knapsack needs sensitivities')
  structure = flags.inspect_network()
  with define.named('budgets'):
    budgets = {w: budgets_lib.parse(w, structure.costs) for w in own.budgets}
    budgets_lib.check(budgets, structure, own.activation_bits)
  return config, budgets


def run() -> None:
  """Solves the knapsacks, scores the solutions and prints their table."""
  config, budgets = check()
  workload = flags.load_workload(search_images=0)
  quantized = pipeline.quantize_network(workload, config, flags.cache())
  sensitivities = pipeline.find_sensitivities(
    workload, quantized, config, flags.cache()
  )
  assert sensitivities is not None  # see `check`
  prior = make_prior(quantized.costs, sensitivities, WIDTHS, budgets_lib.COSTS)
  count = len(quantized.quantizers)
  allowed = budgets_lib.allowed(
    [q.is_weight for q in quantized.quantizers],
    WIDTHS,
    define.own(__name__).activation_bits,
  )
  groups = knapsack.groups(prior, allowed)
  rows = knapsack.front(groups, count, shares=33)
  greedy, gaps = [], []
  for budget in budgets.values():
    row = budgets_lib.best_within(groups, rows, budget)
    best = knapsack.optimum(groups, count, budget)
    (lost, *_), (least, *_) = knapsack.totals(groups, np.stack([row, best]))
    greedy.append(row)
    gaps.append(f'{100 * (lost / least - 1):+.1f} %' if least > 0 else '-')
  bits = np.asarray(WIDTHS)[np.stack(greedy)]
  accuracy = scoring.accuracy(
    quantized,
    workload.variables,
    *workloads.unseen(workload),
    np.concatenate([[widths.float_bits(count)], bits]),
    images_at_once=pipeline.images_at_once(quantized.structure, config),
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


def main() -> None:
  """The command."""
  launch(run)


if __name__ == '__main__':
  main()
