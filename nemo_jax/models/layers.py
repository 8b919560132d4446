"""Layers that the networks share."""

import flax.linen as nn

from nemo_jax.core.types import Array


class FrozenBatchNorm(nn.Module):
  """Batch norm at inference: a scale and a bias for each channel.

  `weights.convert` folds the four vectors of a checkpoint into these two. They
  are also what a deployed network stores.
  """

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Applies the norm over the last axis."""
    shape = (x.shape[-1],)
    scale = self.param('scale', nn.initializers.ones, shape)
    bias = self.param('bias', nn.initializers.zeros, shape)
    return x * scale + bias


def conv(
  features: int, size: int, name: str, stride: int = 1, groups: int = 1
) -> nn.Conv:
  """Square convolution without bias, with PyTorch's symmetric padding.

  Args:
    features: output channels.
    size: sides of the kernel.
    name: of the module.
    stride: in both directions.
    groups: of the channels.
  """
  return nn.Conv(
    features,
    (size, size),
    strides=stride,
    padding=(size - 1) // 2,
    feature_group_count=groups,
    use_bias=False,
    name=name,
  )
