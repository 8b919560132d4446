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
from torch import nn
from torch.ao import quantization as torch_quantization

from benchmarks import measure
from experiments.launch import launch
from nemo_jax import quantize, workloads
from nemo_jax.evaluate import in_chunks
from tests import torch_models

FLAGS = flags.FLAGS
PEERS = {
  'mobilenet_v2': torch_models.MobileNetV2,
  'resnet50': torch_models.ResNet,
  'resnext101_32x8d': lambda: torch_models.ResNet((3, 4, 23, 3), 32, 8),
}
CONTESTANTS = ('quantized', 'float', 'flax', 'torch', 'torch_fake_quantize')

flags.DEFINE_enum('workload', 'mobilenet_v2', list(PEERS), 'network')
flags.DEFINE_integer('images', 64, 'images of one measurement', 1)
flags.DEFINE_integer('batch', 16, 'of them at once', 1)
flags.DEFINE_integer('size', 224, 'sides of an image', 1)
flags.DEFINE_integer('repeats', 7, 'measurements', 1)
flags.DEFINE_multi_enum('contestants', CONTESTANTS, CONTESTANTS, 'who runs')


class FakeQuantized(nn.Module):
  """A layer behind PyTorch's own fake quantization of input and weight."""

  def __init__(self, layer: nn.Module):
    super().__init__()
    self.layer = layer
    self.input = torch_quantization.FakeQuantize(
      torch_quantization.MovingAverageMinMaxObserver, 0, 255
    )
    self.weight = torch_quantization.FakeQuantize(
      torch_quantization.MovingAveragePerChannelMinMaxObserver,
      quant_min=-128,
      quant_max=127,
      dtype=torch.qint8,
      qscheme=torch.per_channel_symmetric,
    )

  def forward(self, x):
    """What the layer makes of quantized operands."""
    x, weight = self.input(x), self.weight(self.layer.weight)
    if isinstance(self.layer, nn.Linear):
      return nn.functional.linear(x, weight, self.layer.bias)
    return self.layer._conv_forward(x, weight, self.layer.bias)


def fake_quantized(model: nn.Module) -> nn.Module:
  """The model with every convolution and dense layer so wrapped."""
  for name, child in model.named_children():
    if isinstance(child, nn.Conv2d | nn.Linear):
      setattr(model, name, FakeQuantized(child))
    else:
      fake_quantized(child)
  return model


def torch_runner(images: np.ndarray, fake: bool):
  """A function that shows PyTorch's network all the images."""
  model = torch_models.randomized(PEERS[FLAGS.workload]())
  pixels = torch.from_numpy(images.astype(np.float32) / 255)
  pixels = pixels.permute(0, 3, 1, 2)  # channels-last in memory
  if fake:
    model = fake_quantized(model).eval()
  model = model.to(memory_format=torch.channels_last)

  @torch.inference_mode()
  def run(images=pixels):
    for batch in images.split(FLAGS.batch):
      model(batch)

  if fake:
    run(pixels[:2])  # observers set the ranges
    model.apply(torch_quantization.disable_observer)
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
