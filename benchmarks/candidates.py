"""Candidates per second, evaluated one after another or several at once.

  python -m benchmarks.candidates --workload=mobilenet_v2 --size=96

Under `vmap` over candidates the weights of a convolution differ within a batch,
which makes it a grouped convolution. Whether this is faster depends on the
backend. Weights and images are random.
"""

import functools

import jax
import numpy as np
from absl import flags

from benchmarks import measure
from experiments.launch import launch
from nemo_jax import quantize, workloads
from nemo_jax.search.evaluate import evaluate
from nemo_jax.tasks import mixed_precision

FLAGS = flags.FLAGS
flags.DEFINE_string('workload', 'cifar10_resnet20', 'network')
flags.DEFINE_integer('images', 32, 'images that score a candidate', 1)
flags.DEFINE_integer('size', None, "sides of an image; the network's if absent")
flags.DEFINE_integer('candidates', 8, 'candidates of one measurement', 1)
flags.DEFINE_list('at_once', ['1', '2', '4', '8'], 'candidates under one vmap')
flags.DEFINE_integer('repeats', 5, 'measurements', 1)


def run() -> None:
  """Measures and prints the table."""
  network = workloads.network(FLAGS.workload, FLAGS.size)
  variables = measure.draw_variables(network.variables)
  draw = np.random.default_rng(0)
  shape = FLAGS.images, *network.images.shape[1:]
  images = draw.integers(0, 256, shape, dtype=np.uint8)
  quantized = quantize(
    network.apply,
    variables,
    images[:2],
    lowering='backend',
    calibration='min_max',
  )
  problem = mixed_precision.make_problem(
    quantized,
    variables,
    images,
    np.zeros(FLAGS.images, np.int32),
    images_at_once=FLAGS.images,
  )
  nodes, widths = problem.allowed.shape
  choices = draw.integers(0, widths, (FLAGS.candidates, nodes))
  choices = choices.astype(np.int32)
  contestants = {}
  for count in map(int, FLAGS.at_once):
    score = functools.partial(evaluate, batch_size=count)
    program = jax.jit(score).lower(problem, choices).compile()
    contestants[f'{count} at once'] = lambda program=program: (
      jax.block_until_ready(program(problem, choices))
    )
  found = measure.times(contestants, FLAGS.repeats)
  print(f'{FLAGS.workload}: {FLAGS.images} images of {shape[1]} px')
  first = next(iter(contestants))
  print(measure.table(found, first, 'candidates', FLAGS.candidates))


if __name__ == '__main__':
  launch(run)
