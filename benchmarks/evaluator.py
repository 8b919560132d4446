"""Images per second of a quantized network, beside other implementations.

  python -m benchmarks.evaluator --workload=mobilenet_v2

measures in turns, in one process, the quantized network as a search runs it (8
bits, with weights quantized for every candidate), the same network in float,
the Flax module, PyTorch's float forward pass and PyTorch's fake-quantize
modules, both eager and channels-last. On an accelerator it measures the
quantized network, the same without this project's kernels, and the Flax module
in float32 and in bfloat16; and the rates of the chip in matrix products and in
copies. Weights and images are random.
"""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import torch
from absl import flags

from benchmarks import measure, torch_quantization
from experiments.launch import launch
from nemo_jax import quantize, workloads
from nemo_jax.core.memory import in_chunks
from nemo_jax.quantization.backend import kernels
from nemo_jax.workloads import _pretrained
from tests import torch_models

FLAGS = flags.FLAGS
CONTESTANTS = {
  'cpu': ['quantized', 'float', 'flax', 'torch', 'torch_fake_quantize'],
  'accelerator': ['quantized', 'quantized_by_xla', 'flax', 'flax_bfloat16'],
}

flags.DEFINE_enum(
  'workload', 'mobilenet_v2', list(torch_quantization.NETWORKS), 'network'
)
flags.DEFINE_integer('images', 64, 'images of one measurement', 1)
flags.DEFINE_integer('batch', 16, 'images at once', 1)
flags.DEFINE_integer('size', 224, 'sides of an image', 1)
flags.DEFINE_integer('repeats', 7, 'measurements', 1)
flags.DEFINE_multi_enum(
  'contestants',
  None,
  sorted({name for names in CONTESTANTS.values() for name in names}),
  'implementations that are measured; those for the backend if absent',
)


def torch_runner(images: np.ndarray, fake: bool):
  """A function that runs PyTorch's network on all images."""
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


def in_bfloat16(variables, pixels):
  """The Flax module with weights and images in bfloat16."""
  variables, images = jax.tree.map(
    lambda x: x.astype(jnp.bfloat16),
    (variables, _pretrained.normalise(pixels)),
  )
  return measure.recipe(FLAGS.workload).model.apply(variables, images)


def jax_runner(apply, *arguments):
  """A function that runs a compiled function and blocks until it has ended."""
  # A new function, since JAX would not trace the same one again.
  program = jax.jit(lambda *x: apply(*x)).lower(*arguments).compile()
  return lambda: jax.block_until_ready(program(*arguments))


def run() -> None:
  """Measures and prints the table."""
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

  def by_xla(*arguments):
    with mock.patch.object(kernels, 'available', return_value=False):
      return candidate(*arguments)

  arguments = variables, jax.device_put(images)
  builders = {
    'quantized': lambda: jax_runner(candidate, *arguments, bits),
    'quantized_by_xla': lambda: jax_runner(by_xla, *arguments, bits),
    'float': lambda: jax_runner(forward(quantized.map_operands), *arguments),
    'flax': lambda: jax_runner(forward(network.apply), *arguments),
    'flax_bfloat16': lambda: jax_runner(forward(in_bfloat16), *arguments),
    'torch': lambda: torch_runner(images, fake=False),
    'torch_fake_quantize': lambda: torch_runner(images, fake=True),
  }
  kind = 'cpu' if jax.default_backend() == 'cpu' else 'accelerator'
  names = FLAGS.contestants or CONTESTANTS[kind]
  found = measure.times(
    {name: builders[name]() for name in names}, FLAGS.repeats
  )
  print(f'{FLAGS.workload}, {FLAGS.size} px, {batch} images at once')
  print(measure.table(found, names[0], 'images', FLAGS.images))
  if kind == 'accelerator':
    peak, copied = measure.chip()
    macs = sum(operation.macs for operation in quantized.operations)
    rate = 2 * macs * FLAGS.images / np.median(found[names[0]])
    print(
      f'{jax.devices()[0].device_kind}: {peak / 1e12:.0f} TFLOP/s in bfloat16, '
      f'of which {names[0]} has {rate / peak:.1%}; copies {copied / 1e12:.2f} '
      'TB/s'
    )


if __name__ == '__main__':
  launch(run)
