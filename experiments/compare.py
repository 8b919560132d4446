"""NEMO beside each of its species alone, at equal evaluations.

  python -m experiments.compare --workdir=runs/compare

runs every method with every seed on the same problem, and prints the
hypervolume of what each has found: on the images of the search, and on test
images that no search has seen. Cells that are done are kept, so the same
command resumes.
"""

import functools
import json
import pathlib
import sys

import jax
import numpy as np
import scipy.stats
import tqdm
from absl import flags

from experiments import options
from experiments.launch import launch
from nemo_jax import mixed_precision, nemo, runs
from nemo_jax import species as species_lib
from nemo_jax.evaluate import evaluate

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(options)

flags.DEFINE_list(
  'methods',
  [
    'direct+floor+gcn+graph_unet+boltzmann',
    'direct',
    'floor',
    'gcn',
    'graph_unet',
    'boltzmann',
  ],
  'species, or several that share the population, joined by +; the first '
  'method is compared with each of the others',
)
flags.DEFINE_list('seeds', ['0', '1', '2', '3', '4'], 'one run each')
flags.register_validator(
  'seeds',
  lambda words: all(word.isdecimal() for word in words),
  'whole numbers, such as 0,1,2',
)
flags.DEFINE_list(
  'objectives',
  list(mixed_precision.DEFAULT_OBJECTIVES),
  f'what to minimise: {", ".join(mixed_precision.OBJECTIVES)}',
)
flags.DEFINE_integer('population', 60, 'evaluations per generation', 2)
flags.DEFINE_integer('generations', 30, 'generations of every run', 1)
flags.DEFINE_string('workdir', 'runs/compare', 'where results are kept')

SCORES = ('search', 'test')


def run_method(problem, unseen, method: str, seeds, note):
  """Yields (seed, result) for one method, whose step is compiled once."""
  species = tuple(
    species_lib.find(name)(problem, FLAGS.population)
    for name in method.split('+')
  )
  budget = FLAGS.population * FLAGS.generations
  init = jax.jit(
    lambda key, problem: nemo.init(
      key, problem, species, FLAGS.population, budget
    )
  )
  step = jax.jit(functools.partial(nemo.step, species=species))
  rescore = jax.jit(evaluate)
  for seed in seeds:
    init_key, run_key = jax.random.split(jax.random.key(seed))
    state, curve = init(init_key, problem), []
    for _ in range(FLAGS.generations):
      state, metrics = step(run_key, state, problem)
      curve.append(float(metrics['hypervolume']))
      note(FLAGS.population)
    found = np.isfinite(state.archive.objectives).all(axis=1)
    choices = np.asarray(state.archive.choices)[found]
    # Padded, so that fronts of all sizes share few compiled programs.
    padding = np.repeat(choices[:1], -len(choices) % 50, axis=0)
    values = rescore(unseen, np.concatenate([choices, padding]))
    result = {
      'search': curve[-1],
      'test': float(nemo.hypervolume(unseen, values)),
      'curve': curve,
      'front_size': len(choices),
    }
    yield seed, result


def table(results: dict, uniform: dict, methods, seeds) -> str:
  """Means, 95 % intervals and how often the first method is ahead."""
  lines = [
    '| method | search images | test images | first is ahead (search, test) |',
    '|---|---|---|---|',
  ]
  score = lambda m, k: np.asarray([results[m][str(s)][k] for s in seeds])
  for method in methods:
    cells, wins = [method], []
    for kind in SCORES:
      values = score(method, kind)
      cell = f'{values.mean():.4f}'
      if len(values) > 1:
        t = scipy.stats.t.ppf(0.975, len(values) - 1)
        cell += f' ± {t * scipy.stats.sem(values):.4f}'
      cells.append(cell)
      wins.append(int((score(methods[0], kind) > values).sum()))
    ahead = f'{wins[0]}, {wins[1]} of {len(seeds)}'
    cells.append('' if method == methods[0] else ahead)
    lines.append(f'| {" | ".join(cells)} |')
  uniform = ' | '.join(f'{uniform[kind]:.4f}' for kind in SCORES)
  lines.append(f'| all uniform bit-widths | {uniform} | |')
  return '\n'.join(lines)


def run() -> None:
  """The experiment."""
  for method in FLAGS.methods:
    builders = [species_lib.find(name) for name in method.split('+')]
    nemo.check_size(FLAGS.population, len(builders))
  mixed_precision.check_options(
    FLAGS.objectives, mixed_precision.DEFAULT_BIT_WIDTHS
  )
  runs.check_folder(FLAGS.workdir)
  here = sys.modules[__name__]
  # Every cell depends on these; methods and seeds may be added.
  started_with = options.values(here, without=('workdir', 'methods', 'seeds'))
  runs.check_flags(FLAGS.workdir, started_with)
  seeds = [int(s) for s in FLAGS.seeds]
  workload = options.load_workload()
  started_with['weights_digest'] = runs.digest(workload.variables)[:12]
  runs.check_flags(FLAGS.workdir, started_with)
  quantized = options.quantize_workload(workload)
  problem, unseen = (
    mixed_precision.make_problem(
      quantized,
      workload.variables,
      *images,
      objectives=FLAGS.objectives,
      images_at_once=options.images_at_once(quantized),
    )
    for images in (workload.search, workload.test)
  )
  runs.write_flags(FLAGS.workdir, started_with)
  path = pathlib.Path(FLAGS.workdir) / 'compare.json'
  results = json.loads(path.read_text()) if path.exists() else {}
  missing = {
    method: [s for s in seeds if str(s) not in results.get(method, {})]
    for method in FLAGS.methods
  }
  budget = FLAGS.population * FLAGS.generations
  total = budget * sum(map(len, missing.values()))
  with tqdm.tqdm(
    total=total, desc='comparing', unit='eval', disable=None
  ) as bar:
    for method, left in missing.items():
      bar.set_postfix_str(method)
      for seed, result in run_method(problem, unseen, method, left, bar.update):
        results.setdefault(method, {})[str(seed)] = result
        runs.write_text(path, json.dumps(results, indent=1) + '\n')
  everywhere = mixed_precision.uniform(problem)
  uniform = {
    kind: float(nemo.hypervolume(p, jax.jit(evaluate)(p, everywhere)))
    for kind, p in zip(SCORES, (problem, unseen), strict=True)
  }
  print(
    f'\nhypervolume of {workload.name} after {budget} evaluations, '
    f'{len(seeds)} seeds, mean ± 95 % interval\n'
  )
  print(table(results, uniform, FLAGS.methods, seeds))


if __name__ == '__main__':
  launch(run)
