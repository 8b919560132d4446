"""What the networks share."""

import flax.linen as nn

from nemo_jax.core.types import Array


class FrozenBatchNorm(nn.Module):
  """Batch norm after training: a scale and a bias for each channel.

  The four vectors of a checkpoint become these two when it is read (see
  `weights.convert`), which is also what is stored on a device.
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
  """A convolution without bias, padded alike on all sides as in PyTorch."""
  return nn.Conv(
    features,
    (size, size),
    strides=stride,
    padding=(size - 1) // 2,
    feature_group_count=groups,
    use_bias=False,
    name=name,
  )
