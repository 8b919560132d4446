"""Compares search methods on one problem, at equal numbers of evaluations.

  python -m experiments.compare --workload=digits --budget=500 --seeds=0,1,2,3,4

A method is a team of species that share one population, joined by + (`nemo`
and `paper` are such teams), or a baseline from `nemo_jax/arena/baselines`.
Sensitivities that a method uses count as evaluations, by their passes over
images. All methods find fronts on the search images. The fronts are scored
again on test images, which no search uses, and there by top-1 error as well.
Results are stored: the same command resumes, also with more methods and seeds.
"""

import json
import pathlib

import tqdm
from absl import flags as absl_flags

from experiments import define, flags
from experiments.launch import launch
from nemo_jax import pipeline, runs, search_run, workloads
from nemo_jax.arena import (
  ablations,
  baselines,
  plots,
  statistics,
  tables,
  tournament,
)
from nemo_jax.config import Config
from nemo_jax.core import files
from nemo_jax.core.types import InputError
from nemo_jax.tasks import objectives

absl_flags.adopt_module_key_flags(flags)

define.words(
  'methods',
  ['nemo', 'paper', *baselines.names()],
  'teams of species joined by +, "nemo" (the default team of a search), '
  f'"paper", or baselines: {", ".join(baselines.names())}; the first is '
  'compared with each of the others. A team may be followed by @ and an '
  f'ablation: {", ".join(ablations.WORDS)}',
)
define.words(
  'seeds',
  ['0', '1', '2', '3', '4'],
  'seeds of the runs of every method',
  numbers=define.SEEDS,
)
define.words(
  'objectives',
  ['divergence', 'size', 'bit_operations'],
  f'what to minimise: {", ".join(objectives.NAMES)}',
  choices=objectives.NAMES,
  of='objective',
)
define.whole('budget', 500, 'evaluations of every method', 2)
define.whole(
  'population',
  20,
  'evaluations of a generation; for all methods the budget is used, and the '
  'hypervolume measured, in blocks of this size',
  *define.POPULATIONS,
)
define.path(
  'workdir',
  None,
  'folder of the results; runs/compare/WORKLOAD if absent',
)


# Flags that may differ between the runs in one folder.
FREE = ('workdir', 'methods', 'seeds')


def workdir() -> pathlib.Path:
  """The folder of the results."""
  folder = define.own(__name__).workdir
  return files.local(folder or f'runs/compare/{flags.workload_name()}')


def check() -> Config:
  """The config of the flags.

  Raises:
    InputError: a flag cannot be used.
  """
  flags.check_sources()
  own = define.own(__name__)
  for method in own.methods:
    with define.named('methods'):
      tournament.check_method(method)
    with define.named('population'):
      tournament.check_population(method, own.population)
  first, *rest = own.objectives or ['none']
  if (
    first not in objectives.PERFORMANCE
    or len(rest) not in (1, 2)
    or not set(rest) <= set(objectives.COSTS)
    or len(set(rest)) < len(rest)
  ):
    raise InputError(
      f'--objectives is {",".join(own.objectives)}; give one of '
      f'{", ".join(objectives.PERFORMANCE)}, then one or two of '
      f'{", ".join(objectives.COSTS)}'
    )
  config = flags.config()
  if config.sensitivities == 'none':
    raise InputError(
      '--sensitivities=none: baselines and teams need sensitivities; name a '
      'team without them in --methods, such as direct@blind or paper'
    )
  if own.budget < own.population:
    raise InputError(
      f'--budget={own.budget} is less than one generation of '
      f'--population={own.population}'
    )
  with define.named('workdir'):
    runs.check_folder(workdir())
  return config


def check_budget(rules: tournament.Rules, method: str) -> None:
  """Raises `InputError` if sensitivities leave no budget for a generation."""
  print(
    f'sensitivities count as {rules.sensitivity_cost} evaluations of '
    f'{rules.budget}'
  )
  if rules.budget - rules.sensitivity_cost < rules.population:
    raise InputError(
      f'--budget={rules.budget} leaves no generation of '
      f'--population={rules.population} after the {rules.sensitivity_cost} '
      f'evaluations that {method} sensitivities count as'
    )


def run() -> None:
  """Runs the comparison."""
  config = check()
  folder, own = workdir(), define.own(__name__)
  # All results depend on these flags; methods and seeds may be added.
  kept = {k: v for k, v in vars(own).items() if k not in FREE}
  settings = flags.settings(config) | kept
  runs.check_flags(folder, settings)
  workload = flags.load_workload()
  read = search_run.digests(workload)
  runs.check_flags(folder, settings, read)
  prepared = pipeline.prepare(workload, config, flags.cache())
  known = {
    'bank': prepared.quantized.bank,
    'sensitivities': prepared.sensitivities,
  }
  read |= {name: files.digest(tree) for name, tree in known.items()}
  more = [n for n in ('top1_error',) if n not in own.objectives]
  # `run_cell` puts top-1 error first, in place of the performance.
  unseen = pipeline.make_problem(
    workload,
    prepared.quantized,
    config,
    prepared.sensitivities,
    images=workloads.unseen(workload),
    objectives=[*own.objectives, *more],
  )
  cost = pipeline.sensitivity_evaluations(
    workload, prepared.quantized, config.sensitivities, config.bit_widths
  )
  rules = tournament.Rules(own.budget, own.population, cost)
  check_budget(rules, config.sensitivities)
  flow = prepared.quantized.structure.data_flow_graph
  with runs.started(folder, settings, read) as (digest, _):
    # All are built before the first is run, so that errors come at once.
    built = {
      method: tournament.contestant(method, prepared.problem, flow, rules)
      for method in own.methods
    }
    total = own.budget * len(own.methods) * len(own.seeds)
    with tqdm.tqdm(
      total=total, desc='comparing', unit='eval', disable=None
    ) as bar:
      results = tournament.run_all(
        folder / 'compare.json', built, own.seeds, unseen, rules, digest, bar
      )
    summary = statistics.summarise(results, own.methods, own.seeds)
    files.write_text(folder / 'summary.json', json.dumps(summary, indent=1))
    print(f'\n{workload.name}, {own.budget} evaluations\n')
    print(tables.table(summary))
    for path in plots.plot_compare(
      folder, results, own.methods, own.objectives
    ):
      print(f'picture   {path}')


def main() -> None:
  """The command."""
  launch(run)


if __name__ == '__main__':
  main()
