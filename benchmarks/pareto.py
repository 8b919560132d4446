"""Times of non-dominated rank and hypervolume, beside moocore and pymoo.

  python -m benchmarks.pareto

prints the ratios of times for each number of points, and the memory that the
compiled rank needs.
"""

import jax
import jax.numpy as jnp
import moocore
import numpy as np
from absl import flags
from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting

from benchmarks import measure
from experiments.launch import launch
from nemo_jax import pareto

FLAGS = flags.FLAGS
flags.DEFINE_list(
  'rank_points', ['100', '1000', '10000', '100000'], 'points to rank'
)
flags.DEFINE_list(
  'volume_points', ['100', '1000', '10000'], 'points of a hypervolume'
)
flags.DEFINE_integer('repeats', 15, 'measurements', 1)


def jitted(function, *arguments):
  """The compiled function on its arguments, as a call without; and itself."""
  program = jax.jit(function).lower(*arguments).compile()
  arguments = jax.device_put(arguments)
  return lambda: jax.block_until_ready(program(*arguments)), program


def run() -> None:
  """Measures and prints the tables."""
  draw = np.random.default_rng(0)
  for count in map(int, FLAGS.rank_points):
    points = draw.random((count, 3)).astype(np.float32)
    ours, program = jitted(pareto.nondominated_rank, points)
    contestants = {
      'nemo_jax': ours,
      'moocore': lambda points=points: moocore.pareto_rank(points),
    }
    if count <= 10_000:
      contestants['pymoo'] = lambda points=points: NonDominatedSorting().do(
        points
      )
    found = measure.times(contestants, FLAGS.repeats)
    memory = program.memory_analysis().temp_size_in_bytes
    print(f'\nrank of {count:,} x 3; {memory / 2**20:.1f} MiB of scratch')
    print(measure.table(found, 'nemo_jax', 'points', count))
  for count in map(int, FLAGS.volume_points):
    points = np.abs(draw.normal(size=(count, 3)))
    # Points on a sphere, so that none is dominated.
    points = 1 - points / np.linalg.norm(points, axis=1, keepdims=True)
    points = points.astype(np.float32)
    ours, _ = jitted(pareto.hypervolume, points, jnp.ones(3))
    contestants = {
      'nemo_jax': ours,
      'moocore': lambda points=points: moocore.hypervolume(points, ref=[1] * 3),
    }
    found = measure.times(contestants, FLAGS.repeats)
    print(f'\nexact hypervolume of {count:,} x 3')
    print(measure.table(found, 'nemo_jax', 'points', count))


if __name__ == '__main__':
  launch(run)
