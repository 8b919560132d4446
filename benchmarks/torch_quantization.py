"""PyTorch's own fake quantization of the networks that it is compared on."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.ao import quantization

from tests import torch_models

# By workload; the modules go by the names of ours.
NETWORKS = {
  'mobilenet_v2': torch_models.MobileNetV2,
  'resnet50': torch_models.ResNet,
  'resnext101_32x8d': lambda: torch_models.ResNet((3, 4, 23, 3), 32, 8),
  'cifar10_resnet20': torch_models.CifarResNet,
}


class FakeQuantized(nn.Module):
  """A layer behind PyTorch's own fake quantization of input and weight.

  The range of the input has the least squared error over the histogram of what
  was seen; that of the weight is min/max, symmetric, for each output channel.
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
    """Sets the widths, up to 8, and ranges for them from what was seen."""
    ends = {
      self.input: (0, 2**activation - 1),
      self.weight: (-(2 ** (weight - 1)), 2 ** (weight - 1) - 1),
    }
    # The search for a range would take the steps of 8 bits at every width.
    self.input.activation_post_process.dst_nbins = 2**activation
    for fake, (low, high) in ends.items():
      observer = fake.activation_post_process
      observer.quant_min, observer.quant_max = low, high
      fake.scale, zero_point = fake.calculate_qparams()
      fake.zero_point = zero_point.int()

  def forward(self, x):
    """What the layer makes of quantized operands, or of the plain ones."""
    if self.observing:
      self.input.activation_post_process(x)
      return self.layer(x)
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


def layers(model: nn.Module) -> dict[str, FakeQuantized]:
  """The wrapped layers by their paths."""
  modules = model.named_modules()
  return {name: m for name, m in modules if isinstance(m, FakeQuantized)}


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[torch.Tensor]) -> None:
  """Shows batches to the float network; then every layer is at 8 bits."""
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
