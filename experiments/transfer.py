"""Transfers a policy that was evolved on one network to another.

  python -m experiments.transfer --workload=cifar10_resnet20 --weights=FILE \
    --data=train4000.npz

evolves the species `priced_gcn` on the digits, and transfers the survivors to
the workload of the flags, where they are compared in two ways. Without any
evaluation they give a front, which is compared with that of the knapsack at the
same Lagrange multipliers. As the start of a search they are compared with a new
population. Scores are hypervolumes on the search images.
"""

from collections.abc import Callable

import jax
import numpy as np
import tqdm
from absl import flags as absl_flags

from experiments import define, flags
from experiments.launch import launch
from nemo_jax import pipeline, workloads
from nemo_jax.arena import contest, statistics
from nemo_jax.config import Config
from nemo_jax.core.types import InputError, PyTree
from nemo_jax.search import nemo, neuroevolution, policies
from nemo_jax.search.problem import Problem
from nemo_jax.search.species import priced_gcn

absl_flags.adopt_module_key_flags(flags)

define.whole('source_budget', 1000, 'evaluations on the digits', 2)
define.whole('budget', 200, 'evaluations of the workload', 2)
define.whole(
  'population', 20, 'evaluations of a generation', *define.POPULATIONS
)
define.words(
  'seeds',
  ['0', '1', '2', '3', '4'],
  'seeds of the runs',
  numbers=define.SEEDS,
)

OBJECTIVES = ('divergence', 'size', 'bit_operations')


def evolve(
  problem: Problem, seed: int, progress: Callable[[int], None]
) -> PyTree:
  """Weights [P, ...] of the networks that survive a search.

  Args:
    problem: that is searched.
    seed: of the search.
    progress: called with the number of new evaluations.
  """
  own = define.own(__name__)
  search = nemo.make(problem, [priced_gcn.BUILDER], own.population)
  step = jax.jit(search.step)
  init_key, run_key = jax.random.split(jax.random.key(seed))
  state = search.init(init_key)
  for _ in range(own.source_budget // own.population):
    state, _ = step(run_key, state, problem.data)
    progress(own.population)
  policy = priced_gcn.correct(policies.GCN(1), problem)
  members = jax.vmap(neuroevolution.unravel(policy))(state.species[0].members)
  return members['network']


def first_front(problem: Problem, learned: PyTree, seed: int) -> float:
  """Hypervolume of a first population, at random Lagrange multipliers.

  Args:
    problem: of the workload.
    learned: weights from `evolve`; None for those of a new population.
    seed: of the population.
  """
  population = define.own(__name__).population
  one = priced_gcn.make(problem, population, learned=learned)
  ledger = contest.Ledger(problem)
  members = one.init(jax.random.key(seed)).members
  policy = priced_gcn.correct(policies.GCN(1), problem)
  members = jax.vmap(neuroevolution.unravel(policy))(members)
  ledger.score(jax.vmap(policy.choose)(members))
  return ledger.curve[-1][1]


def searched(
  problem: Problem,
  learned: PyTree,
  seed: int,
  progress: Callable[[int], None],
) -> float:
  """Hypervolume after a search.

  Args:
    problem: of the workload.
    learned: weights to start from, see `first_front`.
    seed: of the search.
    progress: called with the number of new evaluations.
  """
  own = define.own(__name__)
  builder = priced_gcn.BUILDER.with_options(learned=learned)
  ledger = contest.Ledger(problem, progress=progress)
  run = contest.team(problem, [builder], own.population)
  run(jax.random.key(seed), own.budget, ledger)
  return ledger.curve[-1][1]


def row(name: str, fresh: np.ndarray, learned: np.ndarray) -> str:
  """A line of the table: both means, and their difference with its interval."""
  gain = learned - fresh
  return (
    f'| {name} | {fresh.mean():.4f} | {learned.mean():.4f} | '
    f'{gain.mean():+.4f} ± {float(statistics.interval(gain)):.4f} |'
  )


def check() -> Config:
  """The config of the flags.

  Raises:
    InputError: a flag cannot be used.
  """
  flags.check_sources()
  own, config = define.own(__name__), flags.config(objectives=OBJECTIVES)
  if config.sensitivities == 'none':
    raise InputError('--sensitivities=none: priced_gcn needs sensitivities')
  if min(own.budget, own.source_budget) < own.population:
    raise InputError(
      f'--budget={own.budget} and --source_budget={own.source_budget} have '
      f'to be at least one generation of --population={own.population}'
    )
  return config


def run() -> None:
  """Evolves, transfers and prints the table."""
  config, own = check(), define.own(__name__)
  workload = flags.load_workload()
  problem = pipeline.prepare(workload, config, flags.cache()).problem
  digits = workloads.load('digits', flags.cache())
  # The digits with the default settings of a search.
  plain = Config(objectives=OBJECTIVES, lowering=config.lowering)
  source = pipeline.prepare(digits, plain, flags.cache()).problem
  fronts, searches = [], []
  total = len(own.seeds) * (own.source_budget + 2 * own.budget)
  with tqdm.tqdm(total=total, unit='eval', disable=None) as bar:
    for seed in map(int, own.seeds):
      learned = evolve(source, seed, bar.update)
      both = (None, learned)
      fronts.append([first_front(problem, x, seed) for x in both])
      searches.append([searched(problem, x, seed, bar.update) for x in both])
  print(
    f'\ndigits to {workload.name}, {len(fronts)} seeds: hypervolume, and the '
    'gain with its 95 % interval\n'
  )
  print('| | fresh | learned | gain |')
  print('|---|---|---|---|')
  words = 'no evaluation', f'{own.budget} evaluations'
  for name, values in zip(words, (fronts, searches), strict=True):
    print(row(name, *np.asarray(values).T))


def main() -> None:
  """The command."""
  launch(run)


if __name__ == '__main__':
  main()
