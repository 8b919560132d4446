"""Finds the Pareto front of mixed-precision configurations of a network.

  python -m experiments.search --workdir=runs/digits

trains (or loads) the workload, calibrates its quantizers, and evolves a
population of species; the front, its pictures and checkpoints are left in the
workdir. The same command resumes a run that was stopped at any instant.
"""

import contextlib
import math
import os
import pathlib
import sys
import time

import jax
import numpy as np
import tqdm
from absl import flags

from experiments import cluster, define, estimates, options
from experiments.launch import launch
from nemo_jax import runs
from nemo_jax.core import devices, files
from nemo_jax.core.types import InputError
from nemo_jax.quantization.numerics import widths as widths_lib
from nemo_jax.runs import front as front_lib
from nemo_jax.runs import report
from nemo_jax.search import nemo
from nemo_jax.search import species as species_lib
from nemo_jax.search.evaluate import candidates_at_once, evaluate
from nemo_jax.tasks import mixed_precision

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(options)
flags.adopt_module_key_flags(estimates)
flags.adopt_module_key_flags(cluster)

define.words(
  'species',
  ['nemo'],
  f'searchers that share the population: {", ".join(species_lib.names())}; or '
  f'"nemo", which is {", ".join(species_lib.NEMO)}, or "paper", which is '
  f'{", ".join(species_lib.PAPER)} without sensitivities; gcn:NAME evolves its '
  'weights by that evosax algorithm in place of SSNE',
)
define.words(
  'objectives',
  mixed_precision.DEFAULT_OBJECTIVES,
  'what to minimise, performance first: '
  f'{", ".join(mixed_precision.OBJECTIVES)}',
  choices=mixed_precision.OBJECTIVES,
  of='objective',
)
define.words(
  'bit_widths',
  map(str, widths_lib.DEFAULT),
  'bit-widths to choose from',
  numbers=(2, 16),
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
flags.DEFINE_bool(
  'data_flow', False, 'searchers see the data-flow graph, not the chain'
)
define.whole(
  'batch_size',
  None,
  'candidates evaluated at once; what suits if absent',
  high=define.POPULATIONS[1],
)
define.number(
  'exploration',
  1.0,
  'weight of the confidence bonus; with inf all species are alike',
  0.0,
  math.inf,
)
define.path('workdir', None, 'where the run is kept; runs/WORKLOAD if absent')


IMAGE_USES = ('calibration', 'search', 'test')


@contextlib.contextmanager
def stage(name: str):
  """Says what is being done, and how long it took."""
  print(f'{name} ...', end=' ', flush=True)
  start = time.monotonic()
  yield
  print(f'{time.monotonic() - start:.1f} s', flush=True)


def workdir() -> pathlib.Path:
  """The folder of the run."""
  return files.local(FLAGS.workdir or os.path.join('runs', FLAGS.workload))


def restore(checkpoints, state, run):
  """The last stored state of the run, or the new one; the same everywhere."""
  if checkpoints:
    state, damaged = runs.restore(checkpoints, state, run)
    for line in damaged:
      print(f'{line}; going back to the one before')
    runs.discard_after(checkpoints, int(state.generation))
    runs.rewind_metrics(workdir(), int(state.generation))
  return devices.from_first(jax.device_get(state))


def describe_memory(program) -> str:
  """What the compiled evaluation takes on each device at its peak."""
  used = program.memory_analysis()
  if used is None:
    return 'not known on this backend'
  arguments = used.argument_size_in_bytes
  total = arguments + used.output_size_in_bytes + used.temp_size_in_bytes
  mib = 2**20
  return (
    f'{total / mib:,.0f} MiB, {arguments / mib:,.0f} of it weights and images'
  )


def search(problem, species, generations: int, batch_size: int, run: str):
  """Runs or resumes the search of the flags; returns its last state.

  Args:
    problem: what is searched.
    species: the searchers.
    generations: how many in all.
    batch_size: candidates evaluated at once.
    run: digest of what the run was started with.
  """
  init_key, run_key = jax.random.split(jax.random.key(FLAGS.seed))
  archive = min(generations * FLAGS.population, 4096)
  state = nemo.init(init_key, problem, species, FLAGS.population, archive)
  is_first = jax.process_index() == 0
  checkpoints = runs.open_checkpoints(workdir()) if is_first else None
  state = restore(checkpoints, state, run)
  done = int(state.generation)
  if done >= generations:
    return state
  if done:
    print(f'resuming after generation {done}')

  with stage('compiling one generation'):
    step, evaluation = nemo.compile_step(
      run_key,
      state,
      problem,
      species,
      exploration=FLAGS.exploration,
      batch_size=batch_size,
    )
  print(f'memory of a device at its peak: {describe_memory(evaluation)}')
  with tqdm.tqdm(
    total=generations * FLAGS.population,
    initial=done * FLAGS.population,
    desc='searching',
    unit='eval',
    disable=None if is_first else True,
  ) as bar:
    stored = runs.evolve(workdir(), checkpoints, step, state, generations, run)
    for last, metrics in stored:
      state = last
      bar.set_postfix(
        front=int(metrics['front_size']),
        hypervolume=f'{metrics.get("hypervolume", np.nan):.4f}',
      )
      bar.update(FLAGS.population)
  return state


def describe(workload, quantized, problem, state, names) -> dict:
  """The content of front.json.

  Args:
    workload: what was searched for.
    quantized: its network.
    problem: what was searched.
    state: the last of the search.
    names: of the species.
  """
  archive = jax.device_get(state.archive)
  rows = np.flatnonzero(np.isfinite(archive.objectives).all(axis=1))
  rows = rows[np.lexsort(archive.objectives[rows].T[::-1])]
  uniform = np.asarray(mixed_precision.uniform(problem))
  uniform_values = devices.jit(evaluate, problem.mesh)(problem, uniform)
  values = np.concatenate([uniform_values, archive.objectives[rows]])
  widths = np.asarray(problem.data.bit_widths)
  bits = widths[np.concatenate([uniform, archive.choices[rows]])]
  accuracy = scoring.accuracy(
    quantized,
    workload.variables,
    *workload.test,
    np.concatenate([[widths_lib.float_bits(len(quantized.quantizers))], bits]),
    images_at_once=options.images_at_once(quantized),
    mesh=problem.mesh,
  )
  on_test = [{'test_accuracy': a, 'test_top5_accuracy': b} for a, b in accuracy]
  points = [
    {'bits': b, 'objectives': o} | a
    for b, o, a in zip(bits, values, on_test[1:], strict=True)
  ]
  front = points[len(uniform) :]
  for point, row in zip(front, rows, strict=True):
    point['species'] = names[archive.species[row]]
  volume = lambda rows: nemo.hypervolume(problem, rows)
  exact = values.shape[1] in (2, 3)
  images = {use: len(getattr(workload, use).labels) for use in IMAGE_USES}
  return {
    'workload': workload.name,
    'seed': FLAGS.seed,
    'evaluations': int(np.asarray(state.evaluations, np.int64).sum()),
    'failures': int(state.failures),
    'images': images | {'size': workload.search.images.shape[1]},
    'objective_names': problem.objective_names,
    'ideal': problem.ideal,
    'reference': problem.reference,
    'bit_widths': widths,
    'quantizers': [q.name for q in quantized.quantizers],
    'is_weight': [q.is_weight for q in quantized.quantizers],
    'species': names,
    'hypervolume': volume(values[len(uniform) :]) if exact else None,
    'uniform_hypervolume': volume(values[: len(uniform)]) if exact else None,
    'float': {
      'objectives': mixed_precision.float_objectives(problem, images['search'])
    }
    | on_test[0],
    'uniform': points[: len(uniform)],
    'points': front,
  }


def summarise(folder: pathlib.Path, front: dict) -> None:
  """Prints what a finished run found, and draws its pictures."""
  chosen = report.choose_points(front, (8, 6, 4, 2))
  print()
  print(report.table(front, chosen))
  print()
  print(
    f'{len(front["points"])} points on the front after '
    f'{front["evaluations"]} evaluations, {front["failures"]} failed'
  )
  if front['hypervolume'] is not None:
    print(
      f'hypervolume {front["hypervolume"]:.4f}; all uniform configurations '
      f'together {front["uniform_hypervolume"]:.4f}'
    )
  print(f'front     {folder / "front.json"}')
  drawings = [
    (report.plot_front, folder, front),
    (report.plot_projections, folder, front),
    (report.plot_species, folder, front, runs.read_metrics(folder)),
  ]
  if chosen:
    drawings.append((report.plot_bits, folder, front, chosen))
  for path in report.draw(drawings):
    print(f'picture   {path}')


def planned_generations() -> int:
  """How many generations the flags ask for.

  Raises:
    InputError: they are none, or too many to count.
  """
  if FLAGS.evaluations and FLAGS.evaluations < FLAGS.population:
    raise InputError(
      f'--evaluations={FLAGS.evaluations} is less than one generation of '
      f'--population={FLAGS.population}'
    )
  if FLAGS.evaluations:
    return FLAGS.evaluations // FLAGS.population
  if FLAGS.generations * FLAGS.population > define.LARGEST:
    raise InputError(
      f'--generations={FLAGS.generations} of --population={FLAGS.population} '
      f'are more than {define.LARGEST} evaluations'
    )
  return FLAGS.generations


def check() -> None:
  """Raises `InputError` for flags that cannot be used."""
  cluster.check()
  options.check()
  planned_generations()
  with define.named('bit_widths'):
    mixed_precision.check_options(
      mixed_precision.DEFAULT_OBJECTIVES, bit_widths()
    )
  with define.named('objectives'):
    mixed_precision.check_options(FLAGS.objectives, bit_widths())
  with define.named('species'):
    builders = species_lib.team(FLAGS.species)
  with define.named('population'):
    nemo.check_size(FLAGS.population, len(builders))
  needing = species_lib.need_prior(FLAGS.species)
  priced = set(FLAGS.objectives) & set(mixed_precision.COSTS)
  if needing and not (priced and FLAGS.sensitivities != 'none'):
    raise InputError(
      f'--species: {needing[0]!r} needs --sensitivities and a cost among the '
      f'objectives, of {", ".join(mixed_precision.COSTS)}'
    )
  if FLAGS.objectives[0] not in mixed_precision.PERFORMANCE:
    raise InputError(
      f'--objectives: the first objective is {FLAGS.objectives[0]!r}; the '
      f'choices are {", ".join(mixed_precision.PERFORMANCE)}'
    )
  with define.named('workdir'):
    ended = (workdir() / 'front.json').exists()
    runs.check_folder(workdir(), read_only=ended)
  with define.named('image_devices'):
    devices.make_mesh(FLAGS.image_devices)


def bit_widths() -> list[int]:
  """Those of the flags."""
  return [int(b) for b in FLAGS.bit_widths]


def prepare(workload, mesh):
  """The quantized network, its sensitivities, the problem, and a batch size."""
  quantized = options.quantize_workload(workload)
  count = len(workload.search.labels)
  macs = sum(operation.macs for operation in quantized.operations)
  batch_size = FLAGS.batch_size or candidates_at_once(macs * count)
  at_once = options.images_at_once(quantized, batch_size or 1)
  known = None
  if not species_lib.is_blind(FLAGS.species):
    known = estimates.sensitivities(workload, quantized, bit_widths())
  problem = mixed_precision.make_problem(
    quantized,
    workload.variables,
    *workload.search,
    objectives=FLAGS.objectives,
    bit_widths=bit_widths(),
    data_flow=FLAGS.data_flow,
    images_at_once=at_once,
    mesh=mesh,
    sensitivities=known,
  )
  return quantized, known, problem, batch_size


def introduce(workload, quantized, batch_size: int) -> None:
  """Prints what is searched, and on how many images."""
  print(
    f'{workload.name}: {len(quantized.quantizers)} quantizers, '
    f'{quantized.costs.parameters:,} parameters, '
    f'{quantized.costs.macs.sum():,} MACs an image'
  )
  weights = sum(q.is_weight for q in quantized.quantizers)
  print(f'{len(quantized.bank.codes)} of {weights} weights reconstructed')
  count = len(workload.search.labels)
  at_once = options.images_at_once(quantized, batch_size or 1)
  print(
    f'{count} images score a candidate, at most {min(at_once, count)} at once'
  )


@cluster.joined()
def run() -> None:
  """The experiment."""
  check()
  generations, builders = planned_generations(), species_lib.team(FLAGS.species)
  here = sys.modules[__name__]
  given = options.values(here, estimates, without=('workdir',))
  runs.check_flags(workdir(), given)
  mesh = devices.make_mesh(FLAGS.image_devices)
  workload = options.load_workload()
  # Weights or images that were changed in place would make it another search.
  read = options.digests(workload)
  runs.check_flags(workdir(), given, read)
  with stage('calibrating the quantizers'):
    quantized, known, problem, batch_size = prepare(workload, mesh)
  introduce(workload, quantized, batch_size)
  own = {'bank': quantized.bank, 'sensitivities': known}
  read |= {name: files.digest(tree) for name, tree in own.items()}
  devices.check_equal(
    files.seal(read)['sha256'], 'weights, images or sensitivities'
  )
  # Before the folder is made: a run that is refused leaves none.
  species = tuple(make(problem, FLAGS.population) for make in builders.values())
  is_first = jax.process_index() == 0
  with contextlib.ExitStack() as stack:
    digest, front = None, None
    if is_first:
      digest, front = stack.enter_context(runs.started(workdir(), given, read))
    if devices.from_first(np.asarray(front is not None)):
      print(f'all {generations} generations of this run are done')
    else:
      state = search(problem, species, generations, batch_size, digest)
      print(f'scoring the front on {len(workload.test.labels)} unseen images')
      front = describe(workload, quantized, problem, state, list(builders))
      if is_first:
        runs.write_front(workdir(), front | {'run': digest})
        front = runs.read_front(workdir(), front_lib.REPORTED)
    if is_first:
      summarise(workdir(), front)


if __name__ == '__main__':
  launch(run)
