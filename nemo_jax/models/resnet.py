"""Residual networks: ResNet-50, ResNeXt-101, and ResNet-20 for CIFAR.

He et al. 2016 and Xie et al. 2017, as torchvision builds them: the stride of a
bottleneck is in its 3 x 3 convolution.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Float

from nemo_jax.core.types import Array
from nemo_jax.models.layers import FrozenBatchNorm, conv


def _bottleneck(
  x: Array,
  features: int,
  stride: int,
  groups: int,
  width_per_group: int,
  name: str,
) -> Array:
  """1 x 1, grouped 3 x 3 and 1 x 1 convolution to 4 x features, and shortcut.

  The shortcut is projected if the shapes differ.
  """
  width = features * width_per_group // 64 * groups
  norm = lambda part: FrozenBatchNorm(name=f'{name}.{part}')
  y = nn.relu(norm('bn1')(conv(width, 1, f'{name}.conv1')(x)))
  y = conv(width, 3, f'{name}.conv2', stride, groups)(y)
  y = nn.relu(norm('bn2')(y))
  y = norm('bn3')(conv(4 * features, 1, f'{name}.conv3')(y))
  if x.shape != y.shape:
    x = conv(4 * features, 1, f'{name}.downsample.0', stride)(x)
    x = norm('downsample.1')(x)
  return nn.relu(y + x)


class ResNet(nn.Module):
  """Logits [B, num_classes] of images [B, H, W, 3], with bottleneck blocks.

  The defaults are those of ResNet-50.
  """

  blocks: tuple[int, ...] = (3, 4, 6, 3)
  groups: int = 1
  width_per_group: int = 64
  num_classes: int = 1000

  @nn.compact
  def __call__(self, images: Float[Array, 'B H W 3']) -> Float[Array, 'B C']:
    """Applies the network to normalised images."""
    x = conv(64, 7, 'conv1', stride=2)(images)
    x = nn.relu(FrozenBatchNorm(name='bn1')(x))
    x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
    for stage, blocks in enumerate(self.blocks):
      for block in range(blocks):
        x = _bottleneck(
          x,
          features=64 * 2**stage,
          stride=2 if stage and not block else 1,
          groups=self.groups,
          width_per_group=self.width_per_group,
          name=f'layer{stage + 1}.{block}',
        )
    x = jnp.mean(x, axis=(1, 2))
    return nn.Dense(self.num_classes, name='fc')(x)


def resnext101_32x8d() -> ResNet:
  """ResNeXt-101 with 32 groups of width 8; 88,791,336 parameters."""
  return ResNet(blocks=(3, 4, 23, 3), groups=32, width_per_group=8)


def _basic(x: Array, features: int, stride: int, name: str) -> Array:
  """Two 3 x 3 convolutions, and a shortcut without weights.

  Where shapes differ the shortcut is subsampled and new channels are zero.
  """
  norm = lambda part: FrozenBatchNorm(name=f'{name}.{part}')
  y = nn.relu(norm('bn1')(conv(features, 3, f'{name}.conv1', stride)(x)))
  y = norm('bn2')(conv(features, 3, f'{name}.conv2')(y))
  if x.shape != y.shape:
    side = (features - x.shape[-1]) // 2
    x = jnp.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (side, side)))
  return nn.relu(y + x)


class CifarResNet(nn.Module):
  """Logits [B, 10] of images [B, 32, 32, 3]; He et al. 2016, section 4.2.

  Three blocks a stage make it ResNet-20, with 269,722 parameters.
  """

  blocks: int = 3
  num_classes: int = 10

  @nn.compact
  def __call__(self, images: Float[Array, 'B H W 3']) -> Float[Array, 'B C']:
    """Applies the network to normalised images."""
    x = nn.relu(FrozenBatchNorm(name='bn1')(conv(16, 3, 'conv1')(images)))
    for stage in range(3):
      for block in range(self.blocks):
        stride = 2 if stage and not block else 1
        name = f'layer{stage + 1}.{block}'
        x = _basic(x, 16 * 2**stage, stride, name)
    return nn.Dense(self.num_classes, name='linear')(jnp.mean(x, axis=(1, 2)))
