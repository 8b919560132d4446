"""Images a second of a quantized network, beside what others make of it.

  python -m benchmarks.evaluator --workload=mobilenet_v2

measures, in turns and in one process, the quantized network as a search runs it
(8 bits, weights quantized anew for every candidate), its float twin, the plain
Flax module, PyTorch's float forward pass and PyTorch's own fake-quantize
modules, both eager and channels-last. Weights and images are random.
"""

import jax
import numpy as np
import torch
from absl import flags

from benchmarks import measure, torch_quantization
from experiments.launch import launch
from nemo_jax import quantize, workloads
from nemo_jax.evaluate import in_chunks
from tests import torch_models

FLAGS = flags.FLAGS
CONTESTANTS = ('quantized', 'float', 'flax', 'torch', 'torch_fake_quantize')

flags.DEFINE_enum(
  'workload', 'mobilenet_v2', list(torch_quantization.NETWORKS), 'network'
)
flags.DEFINE_integer('images', 64, 'images of one measurement', 1)
flags.DEFINE_integer('batch', 16, 'of them at once', 1)
flags.DEFINE_integer('size', 224, 'sides of an image', 1)
flags.DEFINE_integer('repeats', 7, 'measurements', 1)
flags.DEFINE_multi_enum('contestants', CONTESTANTS, CONTESTANTS, 'who runs')


def torch_runner(images: np.ndarray, fake: bool):
  """A function that shows PyTorch's network all the images."""
  model = torch_models.randomized(torch_quantization.NETWORKS[FLAGS.workload]())
  pixels = torch.from_numpy(images.astype(np.float32) / 255)
  pixels = pixels.permute(0, 3, 1, 2)  # channels-last in memory
  if fake:
    model = torch_quantization.fake_quantized(model).eval()
  model = model.to(memory_format=torch.channels_last)

  @torch.inference_mode()
  def run(images=pixels):
    for batch in images.split(FLAGS.batch):
      model(batch)

  if fake:
    torch_quantization.calibrate(model, [pixels[:2]])
  return run


def jax_runner(apply, *arguments):
  """A function that runs a compiled one to its end."""
  program = jax.jit(apply).lower(*arguments).compile()
  return lambda: jax.block_until_ready(program(*arguments))


def run() -> None:
  """The benchmark."""
  network = workloads.network(FLAGS.workload, FLAGS.size)
  variables = jax.device_put(measure.draw_variables(network.variables))
  shape = FLAGS.images, FLAGS.size, FLAGS.size, 3
  draw = np.random.default_rng(1)
  images = draw.integers(0, 256, shape, dtype=np.uint8)
  quantized = quantize(
    network.apply,
    variables,
    images[:2],
    lowering='backend',
    calibration='min_max',
  )
  bits = np.full(len(quantized.quantizers), 8, np.int32)
  batch = FLAGS.batch

  def candidate(variables, images, bits):
    encoded = quantized.encode(variables, bits, max_bits=8)
    run = lambda part: quantized.run(variables, part, encoded)
    return in_chunks(run, images, batch)

  def forward(apply):
    return lambda variables, images: in_chunks(
      lambda part: apply(variables, part), images, batch
    )

  arguments = variables, jax.device_put(images)
  builders = {
    'quantized': lambda: jax_runner(candidate, *arguments, bits),
    'float': lambda: jax_runner(forward(quantized.intercept), *arguments),
    'flax': lambda: jax_runner(forward(network.apply), *arguments),
    'torch': lambda: torch_runner(images, fake=False),
    'torch_fake_quantize': lambda: torch_runner(images, fake=True),
  }
  chosen = {name: builders[name]() for name in FLAGS.contestants}
  found = measure.times(chosen, FLAGS.repeats)
  print(f'{FLAGS.workload}, {FLAGS.size} px, {batch} images at once')
  print(measure.table(found, FLAGS.contestants[0], 'images', FLAGS.images))


if __name__ == '__main__':
  launch(run)
