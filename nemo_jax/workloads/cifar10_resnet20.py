"""ResNet-20 on CIFAR-10: a small network for experiments."""

import functools

from nemo_jax.models import resnet
from nemo_jax.workloads import _pretrained

RECIPE = _pretrained.Recipe(
  name='cifar10_resnet20',
  model=resnet.CifarResNet(),
  url=None,
  num_classes=10,
  image_size=32,
  resize=32,
  search_images=1000,
)
network = functools.partial(_pretrained.network, RECIPE)
check = functools.partial(_pretrained.check, RECIPE)
load = functools.partial(_pretrained.load, RECIPE)
