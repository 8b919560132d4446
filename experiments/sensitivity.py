"""Measures how well sums of sensitivities rank configurations, by method.

  python -m experiments.sensitivity --workload=digits

estimates sensitivities by every method on the calibration images. It prints how
their sums correlate with the measured divergence on the search images, over
random configurations and over configurations near the front of a knapsack on
the sensitivities. It also prints the cost of each method, in seconds and in
evaluations of a search.
"""

import dataclasses
import time
from collections.abc import Mapping

import jax
import numpy as np
import scipy.stats
import tqdm
from absl import flags as absl_flags
from jaxtyping import Float, Int

from experiments import define, flags
from experiments.launch import launch
from nemo_jax import pipeline
from nemo_jax.arena import contest
from nemo_jax.config import Config
from nemo_jax.core.types import Array, ArrayLike, InputError
from nemo_jax.quantization import sensitivity
from nemo_jax.quantization.numerics import widths as widths_lib
from nemo_jax.search import prior as prior_lib
from nemo_jax.search.problem import Problem

absl_flags.adopt_module_key_flags(flags)

absl_flags.DEFINE_multi_enum(
  'methods',
  list(sensitivity.METHODS),
  list(sensitivity.METHODS),
  'method that estimates sensitivities; repeat the flag for several',
)
define.whole(
  'configurations', 200, 'number of configurations of each kind', 3, 10**6
)
define.whole('seed', 0, 'seed of the configurations', *define.SEEDS)

WIDTHS = widths_lib.DEFAULT
COSTS = ('size', 'bit_operations')


def near_front(
  key: Array,
  problem: Problem,
  tables: Mapping[str, Float[ArrayLike, 'N K']],
  count: int,
) -> Int[np.ndarray, 'count N']:
  """Configurations near the fronts of knapsacks on sensitivities.

  Each method has an equal share. About two nodes of a configuration of a front
  are moved to a neighbouring choice.

  Args:
    key: random key.
    problem: with a prior.
    tables: sensitivities by method.
    count: how many configurations.
  """
  assert problem.prior is not None
  draw = np.random.default_rng(np.asarray(jax.random.key_data(key)))
  rows = []
  for table in tables.values():
    known = problem.prior._replace(loss=np.asarray(table, np.float32))
    share = -(-count // len(tables))
    informed = dataclasses.replace(problem, prior=known)
    rows.append(prior_lib.front(key, informed, share))
  rows = np.concatenate([np.asarray(r) for r in rows])[:count]
  moved = draw.random(rows.shape) < 2 / rows.shape[1]
  steps = draw.choice([-1, 1], rows.shape)
  return np.clip(rows + moved * steps, 0, len(WIDTHS) - 1)


def correlations(
  table: Float[ArrayLike, 'N K'],
  rows: Int[np.ndarray, 'n N'],
  truth: Float[np.ndarray, ' n'],
) -> tuple[float, float]:
  """Spearman's and Kendall's correlation of sums of sensitivities.

  Args:
    table: sensitivities.
    rows: choices of configurations.
    truth: measured objective of each.
  """
  sums = np.asarray(table)[np.arange(rows.shape[1]), rows].sum(axis=1)
  return (
    float(scipy.stats.spearmanr(sums, truth).statistic),
    float(scipy.stats.kendalltau(sums, truth).statistic),
  )


def check() -> Config:
  """The config of the flags.

  Raises:
    InputError: a flag cannot be used.
  """
  flags.check_sources()
  methods = define.own(__name__).methods
  if len(set(methods)) < len(methods):
    raise InputError(f'--methods: {", ".join(methods)}: give each once')
  return flags.config(objectives=('divergence', *COSTS), bit_widths=WIDTHS)


def run() -> None:
  """Measures the correlations and prints their table."""
  config, own = check(), define.own(__name__)
  workload = flags.load_workload()
  quantized = pipeline.quantize_network(workload, config, flags.cache())
  tables, seconds = {}, {}
  for method in own.methods:
    start = time.monotonic()
    chosen = dataclasses.replace(config, sensitivities=method)
    # Without a cache, since the computation is timed.
    tables[method] = pipeline.find_sensitivities(
      workload, quantized, chosen, None
    )
    seconds[method] = time.monotonic() - start
  problem = pipeline.make_problem(
    workload, quantized, config, next(iter(tables.values()))
  )
  draw = np.random.default_rng(own.seed)
  count, (nodes, choices) = own.configurations, problem.allowed.shape
  kinds = {
    'random': draw.integers(0, choices, (count, nodes)),
    'near_front': near_front(jax.random.key(own.seed), problem, tables, count),
  }
  with tqdm.tqdm(total=2 * count, desc='measuring', disable=None) as bar:
    truth = {
      kind: contest.objectives(problem, rows, bar.update)[:, 0]
      for kind, rows in kinds.items()
    }
  print(
    f'\n{workload.name}: Spearman (Kendall) over {count} configurations, '
    f'{len(workload.calibration.labels)} calibration images, '
    f'{len(problem.data.labels)} to measure\n'
  )
  print('| sensitivities | random | near the front | seconds | evaluations |')
  print('|---|---|---|---|---|')
  for method, table in tables.items():
    cells = []
    for kind, rows in kinds.items():
      spearman, kendall = correlations(table, rows, truth[kind])
      cells.append(f'{spearman:.3f} ({kendall:.3f})')
    spent = pipeline.sensitivity_evaluations(
      workload, quantized, method, WIDTHS
    )
    cells += [f'{seconds[method]:.1f}', f'{spent}']
    print(f'| {method} | {" | ".join(cells)} |')


def main() -> None:
  """The command."""
  launch(run)


if __name__ == '__main__':
  main()
