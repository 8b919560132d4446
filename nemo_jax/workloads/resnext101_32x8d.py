"""ResNeXt-101 32x8d on ImageNet; torchvision's weights: 79.31 % top-1."""

import functools

from nemo_jax.models import resnet
from nemo_jax.workloads import _pretrained

RECIPE = _pretrained.Recipe(
  name='resnext101_32x8d',
  model=resnet.resnext101_32x8d(),
  url='https://download.pytorch.org/models/resnext101_32x8d-8ba56ff5.pth',
  **_pretrained.IMAGENET,
)
network = functools.partial(_pretrained.network, RECIPE)
check = functools.partial(_pretrained.check, RECIPE)
load = functools.partial(_pretrained.load, RECIPE)
