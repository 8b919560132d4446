"""MobileNet-V2 (Sandler et al. 2018, table 2), as torchvision builds it."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Float

from nemo_jax.core.types import Array
from nemo_jax.models.layers import FrozenBatchNorm, conv

# Expansion, output channels, number of blocks, stride of the first block.
STAGES = (
  (1, 16, 1, 1),
  (6, 24, 2, 2),
  (6, 32, 3, 2),
  (6, 64, 4, 2),
  (6, 96, 3, 1),
  (6, 160, 3, 2),
  (6, 320, 1, 1),
)


def _conv_norm_act(
  x: Array,
  features: int,
  size: int,
  name: str,
  stride: int = 1,
  groups: int = 1,
) -> Array:
  """Convolution, batch norm and ReLU6."""
  x = conv(features, size, f'{name}.0', stride, groups)(x)
  return nn.relu6(FrozenBatchNorm(name=f'{name}.1')(x))


def _inverted_residual(
  x: Array, expansion: int, features: int, stride: int, name: str
) -> Array:
  """Expansion, depthwise convolution, projection; plus x if shapes agree."""
  width, y, part = x.shape[-1] * expansion, x, 0
  if expansion != 1:
    y, part = _conv_norm_act(y, width, 1, f'{name}.conv.0'), 1
  y = _conv_norm_act(y, width, 3, f'{name}.conv.{part}', stride, groups=width)
  y = conv(features, 1, f'{name}.conv.{part + 1}')(y)
  y = FrozenBatchNorm(name=f'{name}.conv.{part + 2}')(y)
  return x + y if y.shape == x.shape else y


class MobileNetV2(nn.Module):
  """Logits [B, num_classes] of images [B, H, W, 3]; 3,504,872 parameters."""

  num_classes: int = 1000

  @nn.compact
  def __call__(self, images: Float[Array, 'B H W 3']) -> Float[Array, 'B C']:
    """Applies the network to normalised images."""
    x = _conv_norm_act(images, 32, 3, 'features.0', stride=2)
    index = 1
    for expansion, features, blocks, stride in STAGES:
      for block in range(blocks):
        step, name = stride if block == 0 else 1, f'features.{index}'
        x = _inverted_residual(x, expansion, features, step, name)
        index += 1
    x = _conv_norm_act(x, 1280, 1, f'features.{index}')
    x = jnp.mean(x, axis=(1, 2))
    return nn.Dense(self.num_classes, name='classifier.1')(x)
