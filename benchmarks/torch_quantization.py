"""PyTorch's fake quantization of the networks of the benchmarks."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.ao import quantization

from tests import torch_models

# By workload; the modules have the names of those in `nemo_jax.models`.
NETWORKS = {
  'mobilenet_v2': torch_models.MobileNetV2,
  'resnet50': torch_models.ResNet,
  'resnext101_32x8d': lambda: torch_models.ResNet((3, 4, 23, 3), 32, 8),
  'cifar10_resnet20': torch_models.CifarResNet,
}


class FakeQuantized(nn.Module):
  """A layer with PyTorch's fake quantization of its input and weight.

  The range of the input has the least squared error over a histogram of the
  observed values; that of the weight is min/max, symmetric, for each output
  channel.
  """

  def __init__(self, layer: nn.Module):
    super().__init__()
    self.layer = layer
    self.observing = False
    self.input = quantization.FakeQuantize(
      quantization.HistogramObserver, quant_min=0, quant_max=255
    )
    self.weight = quantization.FakeQuantize(
      quantization.PerChannelMinMaxObserver,
      quant_min=-128,
      quant_max=127,
      dtype=torch.qint8,
      qscheme=torch.per_channel_symmetric,
    )

  def set_bits(self, weight: int, activation: int) -> None:
    """Sets bit-widths, up to 8, and their ranges from the observed values."""
    ends = {
      self.input: (0, 2**activation - 1),
      self.weight: (-(2 ** (weight - 1)), 2 ** (weight - 1) - 1),
    }
    # Else the search for a range would assume 8 bits at every bit-width.
    self.input.activation_post_process.dst_nbins = 2**activation
    for fake, (low, high) in ends.items():
      observer = fake.activation_post_process
      observer.quant_min, observer.quant_max = low, high
      fake.scale, zero_point = fake.calculate_qparams()
      fake.zero_point = zero_point.int()

  def forward(self, x):
    """The layer on quantized operands; on float ones while observing."""
    if self.observing:
      self.input.activation_post_process(x)
      return self.layer(x)
    x, weight = self.input(x), self.weight(self.layer.weight)
    if isinstance(self.layer, nn.Linear):
      return nn.functional.linear(x, weight, self.layer.bias)
    return self.layer._conv_forward(x, weight, self.layer.bias)


def fake_quantized(model: nn.Module) -> nn.Module:
  """The model with all convolutions and dense layers wrapped, in place."""
  for name, child in model.named_children():
    if isinstance(child, nn.Conv2d | nn.Linear):
      setattr(model, name, FakeQuantized(child))
    else:
      fake_quantized(child)
  return model


def layers(model: nn.Module) -> dict[str, FakeQuantized]:
  """The wrapped layers by path."""
  modules = model.named_modules()
  return {name: m for name, m in modules if isinstance(m, FakeQuantized)}


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[torch.Tensor]) -> None:
  """Observes batches in the float network, and sets all layers to 8 bits."""
  found = layers(model).values()
  for layer in found:
    layer.observing = True
    layer.weight.activation_post_process(layer.layer.weight)
  for batch in batches:
    model(batch)
  for layer in found:
    layer.observing = False
    for fake in (layer.input, layer.weight):
      fake.disable_observer()
    layer.set_bits(8, 8)
