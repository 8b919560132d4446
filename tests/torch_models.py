"""The networks once more, in PyTorch and by torchvision's names: an oracle."""

import torch
import torch.nn.functional as F
from torch import nn


def _conv_norm_act(inputs, outputs, size, stride=1, groups=1):
  return nn.Sequential(
    nn.Conv2d(
      inputs, outputs, size, stride, size // 2, groups=groups, bias=False
    ),
    nn.BatchNorm2d(outputs),
    nn.ReLU6(),
  )


class InvertedResidual(nn.Module):
  def __init__(self, inputs, outputs, stride, expansion):
    super().__init__()
    width = inputs * expansion
    layers = [_conv_norm_act(inputs, width, 1)] if expansion > 1 else []
    layers.append(_conv_norm_act(width, width, 3, stride, width))
    layers.append(nn.Conv2d(width, outputs, 1, bias=False))
    layers.append(nn.BatchNorm2d(outputs))
    self.conv = nn.Sequential(*layers)
    self.adds = stride == 1 and inputs == outputs

  def forward(self, x):
    return x + self.conv(x) if self.adds else self.conv(x)


class MobileNetV2(nn.Module):
  def __init__(self):
    super().__init__()
    layers, width = [_conv_norm_act(3, 32, 3, 2)], 32
    for t, c, n, s in (
      [1, 16, 1, 1],
      [6, 24, 2, 2],
      [6, 32, 3, 2],
      [6, 64, 4, 2],
      [6, 96, 3, 1],
      [6, 160, 3, 2],
      [6, 320, 1, 1],
    ):
      for i in range(n):
        layers.append(InvertedResidual(width, c, s if i == 0 else 1, t))
        width = c
    layers.append(_conv_norm_act(width, 1280, 1))
    self.features = nn.Sequential(*layers)
    self.classifier = nn.Sequential(nn.Dropout(), nn.Linear(1280, 1000))

  def forward(self, x):
    return self.classifier(self.features(x).mean([2, 3]))


class Bottleneck(nn.Module):
  def __init__(self, inputs, features, stride, groups, base_width):
    super().__init__()
    width, outputs = int(features * base_width / 64) * groups, features * 4
    self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
    self.bn1 = nn.BatchNorm2d(width)
    self.conv2 = nn.Conv2d(
      width, width, 3, stride, 1, groups=groups, bias=False
    )
    self.bn2 = nn.BatchNorm2d(width)
    self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
    self.bn3 = nn.BatchNorm2d(outputs)
    if stride != 1 or inputs != outputs:
      self.downsample = nn.Sequential(
        nn.Conv2d(inputs, outputs, 1, stride, bias=False),
        nn.BatchNorm2d(outputs),
      )
    else:
      self.downsample = nn.Identity()

  def forward(self, x):
    y = F.relu(self.bn1(self.conv1(x)))
    y = F.relu(self.bn2(self.conv2(y)))
    return F.relu(self.bn3(self.conv3(y)) + self.downsample(x))


class ResNet(nn.Module):
  def __init__(self, blocks=(3, 4, 6, 3), groups=1, base_width=64):
    super().__init__()
    self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
    self.bn1 = nn.BatchNorm2d(64)
    width = 64
    for stage, count in enumerate(blocks):
      features, layers = 64 * 2**stage, []
      for i in range(count):
        stride = 2 if stage > 0 and i == 0 else 1
        layers.append(Bottleneck(width, features, stride, groups, base_width))
        width = features * 4
      setattr(self, f'layer{stage + 1}', nn.Sequential(*layers))
    self.fc = nn.Linear(width, 1000)

  def forward(self, x):
    x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
    x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
    return self.fc(x.mean([2, 3]))


class BasicBlock(nn.Module):
  def __init__(self, inputs, features, stride):
    super().__init__()
    self.conv1 = nn.Conv2d(inputs, features, 3, stride, 1, bias=False)
    self.bn1 = nn.BatchNorm2d(features)
    self.conv2 = nn.Conv2d(features, features, 3, 1, 1, bias=False)
    self.bn2 = nn.BatchNorm2d(features)
    self.pad = (features - inputs) // 2

  def forward(self, x):
    y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
    if self.pad:
      x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
    return F.relu(y + x)


class CifarResNet(nn.Module):
  def __init__(self):
    super().__init__()
    self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
    self.bn1 = nn.BatchNorm2d(16)
    width = 16
    for stage in range(3):
      features, layers = 16 * 2**stage, []
      for i in range(3):
        stride = 2 if stage > 0 and i == 0 else 1
        layers.append(BasicBlock(width, features, stride))
        width = features
      setattr(self, f'layer{stage + 1}', nn.Sequential(*layers))
    self.linear = nn.Linear(64, 10)

  def forward(self, x):
    x = F.relu(self.bn1(self.conv1(x)))
    x = self.layer3(self.layer2(self.layer1(x)))
    return self.linear(x.mean([2, 3]))


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
  """The model with weights, norms and statistics that nothing can hide in."""
  generator = torch.Generator().manual_seed(seed)
  for name, x in model.state_dict().items():
    if x.ndim > 1:
      x.normal_(0, (2 / x[0].numel()) ** 0.5, generator=generator)
    elif name.endswith(('running_var', 'weight')):
      x.uniform_(0.5, 1.5, generator=generator)
    elif x.is_floating_point():
      x.normal_(0, 0.1, generator=generator)
  return model.eval()
