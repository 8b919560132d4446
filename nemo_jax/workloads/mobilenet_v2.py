"""MobileNet-V2 on ImageNet; torchvision's weights reach 71.88 % top-1."""

import functools

from nemo_jax.models import mobilenet_v2
from nemo_jax.workloads import _pretrained

RECIPE = _pretrained.Recipe(
  name='mobilenet_v2',
  model=mobilenet_v2.MobileNetV2(),
  url='https://download.pytorch.org/models/mobilenet_v2-b0353104.pth',
  **_pretrained.IMAGENET,
)
network = functools.partial(_pretrained.network, RECIPE)
check = functools.partial(_pretrained.check, RECIPE)
load = functools.partial(_pretrained.load, RECIPE)
