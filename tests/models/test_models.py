"""Networks, and the checkpoints they are read from, against PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from nemo_jax import workloads
from nemo_jax.models import weights
from nemo_jax.quantization.transform import inspect
from tests import torch_models

MODELS = {
  'mobilenet_v2': torch_models.MobileNetV2,
  'resnet50': torch_models.ResNet,
  'resnext101_32x8d': lambda: torch_models.ResNet((3, 4, 23, 3), 32, 8),
  'cifar10_resnet20': torch_models.CifarResNet,
}
FILES = {
  'mobilenet_v2': 'mobilenet_v2.pth',
  'resnet50': 'resnet50.pth',
  'cifar10_resnet20': 'cifar10_resnet20.th',
}
MEAN = np.asarray([0.485, 0.456, 0.406], np.float32)
DEVIATION = np.asarray([0.229, 0.224, 0.225], np.float32)


def numpy_state(model) -> dict:
  return {name: x.numpy() for name, x in model.state_dict().items()}


def check_equal(name, model, variables, size):
  """The logits are PyTorch's, and not so by being constant."""
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (2, size, size, 3), np.uint8)
  scaled = (pixels.astype(np.float32) / 255 - MEAN) / DEVIATION
  with torch.no_grad():
    expected = model(torch.from_numpy(scaled.transpose(0, 3, 1, 2))).numpy()
  network = workloads.network(name)
  logits = np.asarray(jax.jit(network.apply)(variables, pixels))
  assert expected.std() > 1e-3
  scale = np.abs(expected).max()
  np.testing.assert_allclose(logits, expected, atol=2e-5 * scale, rtol=0)


@pytest.mark.parametrize('name', sorted(MODELS))
def test_logits_are_those_of_pytorch(name):
  model = torch_models.randomized(MODELS[name]())
  shapes = workloads.network(name).variables
  variables = weights.convert(numpy_state(model), shapes)
  check_equal(name, model, variables, 32 if 'cifar' in name else 75)


@pytest.mark.parametrize('name', sorted(FILES))
def test_logits_of_real_weights_are_those_of_pytorch(shared, name):
  path = shared / 'weights' / FILES[name]
  stored = torch.load(path, map_location='cpu', weights_only=True)
  stored = stored.get('state_dict', stored)
  model = MODELS[name]().eval()
  model.load_state_dict(
    {k.removeprefix('module.'): v for k, v in stored.items()}
  )
  shapes = workloads.network(name).variables
  variables = weights.convert(weights.read(path), shapes)
  check_equal(name, model, variables, 32 if 'cifar' in name else 96)


@pytest.mark.parametrize(
  ('name', 'parameters', 'macs', 'plain', 'papers', 'is_weight'),
  [
    ('mobilenet_v2', 3_504_872, 300_774_272, 106, 117, 53),
    ('resnet50', 25_557_032, 4_089_184_256, 104, 125, 54),
    ('resnext101_32x8d', 88_791_336, 16_414_015_488, 206, 244, 105),
    ('cifar10_resnet20', 269_722, 40_551_040, 40, 50, 20),
  ],
)
def test_counts_are_those_of_the_papers(
  name, parameters, macs, plain, papers, is_weight
):
  network = workloads.network(name)
  for also, count in (((), plain), (('add', 'pool'), papers)):
    structure = inspect(*network, extra_ops=also)
    assert len(structure.quantizers) == count
    assert sum(q.is_weight for q in structure.quantizers) == is_weight
    assert structure.costs.parameters == parameters
    assert structure.costs.macs.sum() == macs


def test_a_smaller_image_has_fewer_macs_and_the_same_weights():
  full, half = (workloads.network('mobilenet_v2', s) for s in (224, 112))
  assert jax.tree.all(
    jax.tree.map(lambda a, b: a == b, full.variables, half.variables)
  )
  macs = [inspect(*n).costs.macs.sum() for n in (full, half)]
  assert 3.5 < macs[0] / macs[1] < 4.5


def test_an_image_that_is_too_small_is_refused():
  with pytest.raises(ValueError, match='image_size is 16; mobilenet_v2'):
    workloads.network('mobilenet_v2', 16)
  with pytest.raises(ValueError, match='digits are 8 x 8'):
    workloads.network('digits', 16)


def test_inspecting_allocates_nothing():
  network = workloads.network('resnext101_32x8d')
  before = {id(x) for x in jax.live_arrays()}
  inspect(*network, extra_ops=('add', 'pool'))
  made = [x for x in jax.live_arrays() if id(x) not in before]
  assert sum(x.nbytes for x in made) < 2**16


@pytest.mark.parametrize('name', ['mobilenet_v2', 'resnext101_32x8d'])
def test_activations_are_counted_as_xla_allocates_them(name):
  # At a size that compiles fast; all scale with the positions.
  network = workloads.network(name, 64)
  images = jax.ShapeDtypeStruct((4, *network.images.shape[1:]), jnp.uint8)
  compiled = jax.jit(network.apply).lower(network.variables, images).compile()
  scratch = compiled.memory_analysis().temp_size_in_bytes
  counted = 4 * inspect(*network).bytes_per_image
  assert counted / 2 < scratch < 2 * counted
