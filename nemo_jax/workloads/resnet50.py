"""ResNet-50 on ImageNet; torchvision's weights reach 76.13 % top-1."""

import functools

from nemo_jax.models import resnet
from nemo_jax.workloads import _pretrained

RECIPE = _pretrained.Recipe(
  name='resnet50',
  model=resnet.ResNet(),
  url='https://download.pytorch.org/models/resnet50-0676ba61.pth',
  **_pretrained.IMAGENET,
)
network = functools.partial(_pretrained.network, RECIPE)
check = functools.partial(_pretrained.check, RECIPE)
load = functools.partial(_pretrained.load, RECIPE)
