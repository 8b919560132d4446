"""Milliseconds of a generation of all species with a trivial evaluation.

  python -m benchmarks.generation
  python -m benchmarks.generation --workload=cifar10_resnet20 --population=60
  python -m benchmarks.generation --species=nemo

The graph is that of a traced network. Objectives are sums over a random table,
which is also the prior of species that need one. It prints the time of a whole
generation, the time in which each species makes its proposals, and the time of
one evaluation from which on the search takes less than 5 %.
"""

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks import measure
from experiments.launch import launch
from nemo_jax import workloads
from nemo_jax.quantization import transform
from nemo_jax.search import nemo, species
from nemo_jax.search.problem import Prior, Problem

FLAGS = flags.FLAGS
flags.DEFINE_string('workload', 'resnext101_32x8d', 'network')
flags.DEFINE_integer('population', 1000, 'evaluations a generation', 2)
flags.DEFINE_integer('repeats', 9, 'measurements', 1)
flags.DEFINE_list(
  'species',
  ['direct', 'floor', 'gcn', 'graph_unet', 'boltzmann'],
  'species of the team',
)
WIDTHS = 7
WARM_UP = 3


def table_problem() -> Problem:
  """Problem over the network's quantizers with random additive objectives."""
  structure = transform.inspect(
    *workloads.network(FLAGS.workload), extra_ops=('add', 'pool')
  )
  nodes = len(structure.quantizers)
  shape = nodes, WIDTHS, 3
  prices = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  known = species.need_prior(FLAGS.species)
  total = lambda prices, row: prices[jnp.arange(nodes), row].sum(axis=0)
  none = np.zeros((0, WIDTHS, WIDTHS, 2), np.float32)
  pairs = np.zeros((0, 2), np.int32)
  # Shifted, since a loss is not negative.
  prior = Prior(prices[..., 0] + 10, prices[..., 1:], pairs, none)
  return Problem(
    graph=structure.sequential_graph,
    data=jnp.asarray(prices),
    allowed=np.ones((nodes, WIDTHS), bool),
    ideal=np.full(3, -2.0 * nodes, np.float32),
    reference=np.full(3, 2.0 * nodes, np.float32),
    evaluate=total,
    objective_names=('a', 'b', 'c'),
    prior=prior if known else None,
    known_objectives=lambda row: total(jnp.asarray(prices), row)[1:],
  )


def run() -> None:
  """Measures and prints the times."""
  problem, places = table_problem(), FLAGS.population
  key = jax.random.key(0)
  team = species.team(FLAGS.species)
  search = nemo.make(problem, list(team.values()), places, batch_size=places)
  contestants, state = {}, search.init(key)
  step, _ = search.compile(key, state)
  for _ in range(WARM_UP):
    state, _ = step(state)
  private = jax.tree.map(jnp.copy, state.species)

  def generation():
    nonlocal state
    state, _ = jax.block_until_ready(step(state))

  contestants['generation'] = generation
  for (name, build), own in zip(team.items(), private, strict=True):
    one = build(problem, places)
    ask = jax.jit(one.ask_more or one.ask)
    contestants[f'{name} proposes'] = lambda ask=ask, own=own: (
      jax.block_until_ready(ask(key, own))
    )
  found = measure.times(contestants, FLAGS.repeats)
  print(f'{FLAGS.workload}: {len(problem.allowed)} nodes, {places} places')
  for name, seconds in found.items():
    print(f'{name:24}{1000 * np.median(seconds):8.1f} ms')
  limit = np.median(found['generation']) / 0.05 / places
  print(f'below 5 % where one evaluation takes {1000 * limit:.1f} ms or more')


if __name__ == '__main__':
  launch(run)
