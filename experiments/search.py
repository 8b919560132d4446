"""Finds the Pareto front of mixed-precision configurations of a network.

  python -m experiments.search --workdir=runs/digits

trains (or loads) the workload, calibrates its quantizers, and evolves a
population of species. The front, its pictures and checkpoints are stored in the
workdir. The same command resumes a run that was stopped at any time.
"""

import math
import os
import pathlib
import sys

import jax
from absl import flags as absl_flags

from experiments import cluster, define, flags
from experiments.launch import launch
from nemo_jax import runs, search_run
from nemo_jax.config import Config
from nemo_jax.core import files
from nemo_jax.core.log import Log
from nemo_jax.core.types import InputError
from nemo_jax.quantization.numerics import widths
from nemo_jax.runs import plots, tables
from nemo_jax.runs.front import FRONT_FILE, Front, choose_points
from nemo_jax.search import species as species_lib
from nemo_jax.tasks import objectives

absl_flags.adopt_module_key_flags(flags)
absl_flags.adopt_module_key_flags(cluster)

define.words(
  'species',
  ['nemo'],
  f'species that share the population: {", ".join(species_lib.names())}; or '
  f'"nemo", which is {", ".join(species_lib.NEMO)}, or "paper", which is '
  f'{", ".join(species_lib.PAPER)} without sensitivities; or a file of your '
  'own that ends in .py; gcn:NAME evolves its weights by that evosax algorithm '
  'instead of SSNE',
)
define.words(
  'objectives',
  objectives.DEFAULT,
  f'what to minimise, performance first: {", ".join(objectives.NAMES)}',
  choices=objectives.NAMES,
  of='objective',
)
define.words(
  'bit_widths',
  [str(width) for width in widths.DEFAULT],
  'bit-widths to choose from',
  numbers=(widths.MIN_BITS, widths.MAX_BITS),
)
define.whole(
  'population', 60, 'evaluations per generation', *define.POPULATIONS
)
define.whole('generations', 30, 'generations to run')
define.whole(
  'evaluations',
  None,
  'budget of evaluations, in whole generations; overrides --generations',
)
define.whole('seed', 0, 'seed of the search', *define.SEEDS)
absl_flags.DEFINE_bool(
  'data_flow',
  False,
  'the graph of the search is the data flow between quantizers, not a chain',
)
define.whole(
  'batch_size',
  None,
  'candidates evaluated at once; chosen by the MACs of an evaluation if absent',
  high=define.POPULATIONS[1],
)
define.number(
  'exploration',
  1.0,
  'weight of the confidence bonus; with inf all species have equal sizes',
  0.0,
  math.inf,
)
define.path('workdir', None, 'folder of the run; runs/WORKLOAD if absent')


def workdir() -> pathlib.Path:
  """The folder of the run."""
  folder = define.own(__name__).workdir
  return files.local(folder or os.path.join('runs', flags.workload_name()))


def budget() -> int:
  """The budget of evaluations that the flags give.

  Raises:
    InputError: it is less than a generation, or too large for int32.
  """
  own = define.own(__name__)
  if own.evaluations and own.evaluations < own.population:
    raise InputError(
      f'--evaluations={own.evaluations} is less than one generation of '
      f'--population={own.population}'
    )
  if own.evaluations:
    return own.evaluations
  if own.generations * own.population > define.LARGEST:
    raise InputError(
      f'--generations={own.generations} of --population={own.population} '
      f'are more than {define.LARGEST} evaluations'
    )
  return own.generations * own.population


def check() -> Config:
  """The config of the flags.

  Raises:
    InputError: a flag cannot be used.
  """
  cluster.check()
  flags.check_sources()
  config = flags.config(evaluations=budget())
  flags.check_search(config)
  with define.named('workdir'):
    ended = (workdir() / FRONT_FILE).exists()
    runs.check_folder(workdir(), read_only=ended)
  return config


def summarise(folder: pathlib.Path, front: Front) -> None:
  """Prints the results of a finished run, and draws its pictures."""
  chosen = choose_points(front, tables.SHOWN)
  print()
  print(tables.table(front, chosen))
  print()
  print(
    f'{len(front.points)} points on the front after '
    f'{front.evaluations} evaluations, {front.failures} failed'
  )
  if front.hypervolume is not None:
    print(
      f'hypervolume {front.hypervolume:.4f}; all uniform configurations '
      f'together {front.uniform_hypervolume:.4f}'
    )
  print(f'front     {folder / FRONT_FILE}')
  drawings = [
    (plots.plot_front, folder, front),
    (plots.plot_projections, folder, front),
    (plots.plot_species, folder, front, runs.read_metrics(folder)),
  ]
  if chosen:
    drawings.append((plots.plot_bits, folder, front, chosen))
  for path in plots.draw(drawings):
    print(f'picture   {path}')


@cluster.joined()
def run() -> None:
  """Runs the search."""
  config = check()
  settings = flags.settings(config)
  runs.check_flags(workdir(), settings)
  front = search_run.run(
    flags.load_workload(),
    config,
    workdir=workdir(),
    cache=flags.cache(),
    settings=settings,
    log=Log(sys.stdout),
  )
  if jax.process_index() == 0:
    summarise(workdir(), front)


def main() -> None:
  """The command."""
  launch(run)


if __name__ == '__main__':
  main()
