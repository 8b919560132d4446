"""The arena: every method at the same number of evaluations, on one problem.

  python -m experiments.compare --workload=digits --budget=500 --seeds=0,1,2,3,4

A method is a team of species that share one population, joined by + (`nemo`
and `paper` are such teams), or a rival from `nemo_jax/baselines`. Passes over
images that a method's knowledge takes are converted into evaluations, and
counted. All find fronts on the search images; these are scored again on images
that no search has seen, there for top-1 error as well. What is done is kept, so
the same command resumes, also with further methods and seeds.
"""

import json
import pathlib
import sys

import jax
import numpy as np
import tqdm
from absl import flags

from experiments import define, estimates, options
from experiments.launch import launch
from nemo_jax import runs
from nemo_jax.arena import ablations, baselines, contest
from nemo_jax.core import files
from nemo_jax.core.types import InputError
from nemo_jax.quantization.numerics import widths as widths_lib
from nemo_jax.runs import report
from nemo_jax.search import nemo
from nemo_jax.search import species as species_lib
from nemo_jax.tasks import mixed_precision

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(options)
flags.adopt_module_key_flags(estimates)

define.words(
  'methods',
  ['nemo', 'paper', *baselines.names()],
  'teams of species joined by +, "nemo" (the default team of a search), '
  f'"paper", or rivals: {", ".join(baselines.names())}; the first is compared '
  'with each of the others. Behind a team and @, what is left out or other: '
  f'{", ".join(ablations.WORDS)}',
)
define.words(
  'seeds', ['0', '1', '2', '3', '4'], 'one run each', numbers=define.SEEDS
)
define.words(
  'objectives',
  ['divergence', 'size', 'bit_operations'],
  f'what to minimise: {", ".join(mixed_precision.OBJECTIVES)}',
  choices=mixed_precision.OBJECTIVES,
  of='objective',
)
define.whole('budget', 500, 'evaluations of every method', 2)
define.whole(
  'population',
  20,
  'places of a team; budget and hypervolume go in blocks of so many '
  'evaluations, for all methods',
  *define.POPULATIONS,
)
define.path('workdir', None, 'runs/compare/WORKLOAD if absent')

SHARES = (0.05, 0.1, 0.2, 0.25, 0.5, 1.0)  # of the budget, that tables show
SCORES = ('search', 'unseen', 'unseen_top1')


def workdir() -> pathlib.Path:
  """Where results are kept."""
  return files.local(FLAGS.workdir or f'runs/compare/{FLAGS.workload}')


def make_problems(workload, quantized, known):
  """What is searched; and the same on unseen images, with top-1 error last."""
  make = lambda images, objectives: mixed_precision.make_problem(
    quantized,
    workload.variables,
    *images,
    objectives=objectives,
    images_at_once=options.images_at_once(quantized),
    sensitivities=known,
  )
  # Top-1 error stands where performance does, once its column is put first.
  more = [n for n in ('top1_error',) if n not in FLAGS.objectives]
  unseen = make(workload.test, [*FLAGS.objectives, *more])
  return make(workload.search, FLAGS.objectives), unseen


def contestant(method: str, problem, quantized):
  """(the problem that it sees, whether it is informed, how it runs)."""
  if method in baselines.names():
    rival = baselines.find(method)
    run = lambda key, problem, evaluations, ledger: rival.search(
      key, problem, evaluations, ledger.score
    )
    return problem, rival.INFORMED, run
  words, at, option = method.partition('@')
  if species_lib.is_blind(words.split('+')):
    problem = mixed_precision.blind(problem)
  settings = {}
  if at:
    problem, settings = ablations.ablate(
      option, problem, quantized.structure.data_flow_graph
    )
  team = species_lib.team(words.split('+')).values()
  made = tuple(make(problem, FLAGS.population) for make in team)
  run = contest.team(made, FLAGS.population, **settings)
  return problem, problem.prior is not None, run


def unseen_volumes(unseen, rows) -> tuple[float, float]:
  """Hypervolumes of a front on unseen images: as searched, for top-1 error."""
  values = contest.objectives(unseen, rows)
  names = list(unseen.objective_names)
  columns = list(range(len(FLAGS.objectives)))
  top1 = [names.index('top1_error'), *columns[1:]]
  return tuple(
    contest.hypervolume(values[:, c], unseen.ideal[c], unseen.reference[c])
    for c in (np.asarray(columns), np.asarray(top1))
  )


def run_cell(seen, run, unseen, seed: int, spent: int, bar):
  """What one method with one seed has found: its curve, and its front."""
  marks = [int(share * FLAGS.budget) for share in SHARES]
  ledger = contest.Ledger(
    seen, spent, FLAGS.population, bar.update, min(FLAGS.budget, 4096)
  )
  blocks = (FLAGS.budget - spent) // FLAGS.population
  run(jax.random.key(seed), seen, blocks * FLAGS.population, ledger)
  volumes = {}
  for mark in marks:
    found = [volume for count, volume in ledger.curve if count <= mark]
    volumes[str(mark)] = {'search': max(found, default=0.0)}
  rows, values = ledger.front()
  last = unseen_volumes(unseen, rows)
  volumes[str(FLAGS.budget)] |= dict(zip(SCORES[1:], last, strict=True))
  return {'curve': ledger.curve, 'volumes': volumes, 'front': values.tolist()}


def check_methods() -> None:
  """Raises `InputError` for methods or objectives that cannot be compared."""
  for method in FLAGS.methods:
    if method in baselines.names():
      continue
    words, at, option = method.partition('@')
    with define.named('methods'):
      if at:
        ablations.check(option)
      try:
        team = species_lib.team(words.split('+'))
      except InputError as error:
        rivals = ', '.join(baselines.names())
        raise InputError(f'{error}; or one of the rivals {rivals}') from error
      needing = species_lib.need_prior(words.split('+'))
      if option == 'blind' and needing:
        raise InputError(
          f'{method!r}: {needing[0]!r} cannot be without sensitivities; name '
          'a team without, such as direct@blind'
        )
    with define.named('population'):
      nemo.check_size(FLAGS.population, len(team))
  first, *rest = FLAGS.objectives or ['none']
  if (
    first not in mixed_precision.PERFORMANCE
    or len(rest) not in (1, 2)
    or not set(rest) <= set(mixed_precision.COSTS)
    or len(set(rest)) < len(rest)
  ):
    raise InputError(
      f'--objectives is {",".join(FLAGS.objectives)}; give one of '
      f'{", ".join(mixed_precision.PERFORMANCE)}, then one or two of '
      f'{", ".join(mixed_precision.COSTS)}'
    )
  if FLAGS.sensitivities == 'none':
    raise InputError(
      '--sensitivities=none: methods are compared with what knowledge gives '
      'them; a team without is such as direct@blind or paper'
    )


def check() -> None:
  """Raises `InputError` for flags that cannot be used."""
  options.check()
  check_methods()
  if FLAGS.budget < FLAGS.population:
    raise InputError(
      f'--budget={FLAGS.budget} is less than one generation of '
      f'--population={FLAGS.population}'
    )
  with define.named('workdir'):
    runs.check_folder(workdir())


def run() -> None:
  """The experiment."""
  check()
  folder = workdir()
  here = sys.modules[__name__]
  # Every cell depends on these; methods and seeds may be added.
  started_with = options.values(
    here, estimates, without=('workdir', 'methods', 'seeds')
  )
  runs.check_flags(folder, started_with)
  workload = options.load_workload()
  read = options.digests(workload)
  runs.check_flags(folder, started_with, read)
  quantized = options.quantize_workload(workload)
  widths = widths_lib.DEFAULT
  known = estimates.sensitivities(workload, quantized, widths)
  own = {'bank': quantized.bank, 'sensitivities': known}
  read |= {name: files.digest(tree) for name, tree in own.items()}
  problem, unseen = make_problems(workload, quantized, known)
  cost = estimates.sensitivity_evaluations(workload, quantized, widths)
  print(f'sensitivities count as {cost} evaluations of {FLAGS.budget}')
  if FLAGS.budget - cost < FLAGS.population:
    raise InputError(
      f'--budget={FLAGS.budget} leaves no generation of '
      f'--population={FLAGS.population} after the {cost} evaluations that '
      f'{FLAGS.sensitivities} sensitivities count as'
    )
  with runs.started(folder, started_with, read) as (digest, _):
    results = run_all(folder, quantized, problem, unseen, cost, digest)
    results = {
      m: {s: results[m][s] for s in FLAGS.seeds} for m in FLAGS.methods
    }
    summary = contest.summarise(results, FLAGS.methods, FLAGS.seeds)
    files.write_text(folder / 'summary.json', json.dumps(summary, indent=1))
    print(f'\n{workload.name}, {FLAGS.budget} evaluations\n')
    print(report.compare_table(summary))
    for path in report.plot_compare(
      folder, results, FLAGS.methods, FLAGS.objectives
    ):
      print(f'picture   {path}')


def read_results(path: pathlib.Path) -> dict:
  """The cells that are done.

  Raises:
    InputError: the file is damaged.
  """
  if not path.exists():
    return {}
  try:
    results = files.read_json(path)
  except files.DamagedError as error:
    raise InputError(f'{error}; delete it') from error
  if not files.is_sealed(results):
    raise InputError(f'{path} is damaged: its digest does not match; delete it')
  return {m: x for m, x in results.items() if m not in ('run', 'sha256')}


def write_results(path: pathlib.Path, results: dict, run: str) -> None:
  """Stores the cells that are done, and which run they are of."""
  content = files.seal(results | {'run': run})
  files.write_text(path, json.dumps(content) + '\n')


def run_all(folder, quantized, problem, unseen, cost: int, run: str) -> dict:
  """The cells of all methods and seeds; those that are done are read."""
  path = folder / 'compare.json'
  results = read_results(path)
  missing = {
    method: [s for s in FLAGS.seeds if s not in results.get(method, {})]
    for method in FLAGS.methods
  }
  # All are built first, so that what cannot be is said at once.
  built = {m: contestant(m, problem, quantized) for m in missing}
  total = FLAGS.budget * sum(map(len, missing.values()))
  with tqdm.tqdm(
    total=total, desc='comparing', unit='eval', disable=None
  ) as bar:
    for method, seeds in missing.items():
      bar.set_postfix_str(method)
      seen, informed, run_one = built[method]
      for seed in seeds:
        spent, before = cost * informed, bar.n
        cell = run_cell(seen, run_one, unseen, int(seed), spent, bar)
        # What was not used counts as done.
        bar.update(FLAGS.budget - (bar.n - before))
        results.setdefault(method, {})[seed] = cell
        write_results(path, results, run)
      # Linux lets a process map 65,530 pieces of memory; a program of a large
      # network takes thousands, and a failed map ends the process.
      jax.clear_caches()
  return results


if __name__ == '__main__':
  launch(run)
