"""A policy that was evolved on one network, at work on another.

  python -m experiments.transfer --workload=cifar10_resnet20 --weights=FILE \
    --data=train4000.npz

evolves `priced_gcn` on the digits, and gives what survives to the workload of
the flags: with no evaluation there, as a front of its own beside that of the
knapsack at the same prices; and as the start of a search beside one that starts
fresh. Scores are hypervolumes on the search images.
"""

import jax
import numpy as np
import tqdm
from absl import flags

from experiments import define, estimates, options
from experiments.launch import launch
from nemo_jax import quantize, workloads
from nemo_jax.arena import contest
from nemo_jax.core.types import InputError
from nemo_jax.quantization import sensitivity
from nemo_jax.quantization.numerics import widths as widths_lib
from nemo_jax.quantization.ptq import reconstruct
from nemo_jax.search import nemo, neuroevolution, policies
from nemo_jax.search.species import priced_gcn
from nemo_jax.tasks import mixed_precision

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(options)
flags.adopt_module_key_flags(estimates)

define.whole('source_budget', 1000, 'evaluations on the digits', 2)
define.whole('budget', 200, 'evaluations of the workload', 2)
define.whole(
  'population', 20, 'evaluations of a generation', *define.POPULATIONS
)
define.words(
  'seeds', ['0', '1', '2', '3', '4'], 'one run each', numbers=define.SEEDS
)

WIDTHS = widths_lib.DEFAULT
OBJECTIVES = ('divergence', 'size', 'bit_operations')


def source_problem():
  """The digits, as a search with default flags sees them."""
  digits = workloads.load('digits', FLAGS.cache)
  images, labels = digits.calibration
  quantized = quantize(
    digits.apply, digits.variables, images, lowering=FLAGS.lowering
  )
  quantized = reconstruct.reconstruct(quantized, digits.variables, images)
  known = sensitivity.second_order(
    quantized,
    digits.variables,
    images,
    labels,
    key=jax.random.key(0),
    widths=WIDTHS,
  )
  return mixed_precision.make_problem(
    quantized,
    digits.variables,
    *digits.search,
    objectives=OBJECTIVES,
    sensitivities=known,
  )


def evolve(problem, seed: int, progress):
  """Weights [P, ...] of the networks that survive a search."""
  species = (priced_gcn.make(problem, FLAGS.population),)
  step = jax.jit(nemo.step, static_argnames='species')
  init_key, run_key = jax.random.split(jax.random.key(seed))
  state = nemo.init(init_key, problem, species, FLAGS.population)
  for _ in range(FLAGS.source_budget // FLAGS.population):
    state, _ = step(run_key, state, problem, species)
    progress(FLAGS.population)
  policy = priced_gcn.correct(policies.GCN(1), problem)
  members = jax.vmap(neuroevolution.unravel(policy))(state.species[0].members)
  return members['network']


def first_front(problem, learned, seed: int) -> float:
  """Hypervolume of one population at prices at random; nothing is evolved."""
  one = priced_gcn.make(problem, FLAGS.population, learned=learned)
  ledger = contest.Ledger(problem)
  members = one.init(jax.random.key(seed)).members
  policy = priced_gcn.correct(policies.GCN(1), problem)
  members = jax.vmap(neuroevolution.unravel(policy))(members)
  ledger.score(jax.vmap(policy.choose)(members))
  return ledger.curve[-1][1]


def searched(problem, learned, seed: int, progress) -> float:
  """Hypervolume after a search that starts from `learned`."""
  one = priced_gcn.make(problem, FLAGS.population, learned=learned)
  ledger = contest.Ledger(problem, progress=progress)
  run = contest.team((one,), FLAGS.population)
  run(jax.random.key(seed), problem, FLAGS.budget, ledger)
  return ledger.curve[-1][1]


def row(name: str, fresh: np.ndarray, learned: np.ndarray) -> str:
  """A line of the table: both means, and the gain with its interval."""
  gain = learned - fresh
  return (
    f'| {name} | {fresh.mean():.4f} | {learned.mean():.4f} | '
    f'{gain.mean():+.4f} ± {float(contest.interval(gain)):.4f} |'
  )


def check() -> None:
  """Raises `InputError` for flags that cannot be used."""
  options.check()
  if FLAGS.sensitivities == 'none':
    raise InputError('--sensitivities=none leaves nothing to correct')
  if min(FLAGS.budget, FLAGS.source_budget) < FLAGS.population:
    raise InputError(
      f'--budget={FLAGS.budget} and --source_budget={FLAGS.source_budget} have '
      f'to be at least one generation of --population={FLAGS.population}'
    )


def run() -> None:
  """The experiment."""
  check()
  workload = options.load_workload()
  quantized = options.quantize_workload(workload)
  problem = mixed_precision.make_problem(
    quantized,
    workload.variables,
    *workload.search,
    objectives=OBJECTIVES,
    images_at_once=options.images_at_once(quantized),
    sensitivities=estimates.sensitivities(workload, quantized, WIDTHS),
  )
  source, fronts, searches = source_problem(), [], []
  total = len(FLAGS.seeds) * (FLAGS.source_budget + 2 * FLAGS.budget)
  with tqdm.tqdm(total=total, unit='eval', disable=None) as bar:
    for seed in map(int, FLAGS.seeds):
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
  words = 'no evaluation', f'{FLAGS.budget} evaluations'
  for name, values in zip(words, (fronts, searches), strict=True):
    print(row(name, *np.asarray(values).T))


if __name__ == '__main__':
  launch(run)
