"""A small search on some of the devices of this process, for test_devices."""

import json

import flax.linen as nn
import jax
import numpy as np

from nemo_jax import quantize
from nemo_jax.core import devices
from nemo_jax.search import nemo
from nemo_jax.search.species import lagrangian
from nemo_jax.tasks import mixed_precision, scoring


class Network(nn.Module):
  """A convolution and a dense layer."""

  @nn.compact
  def __call__(self, images):
    x = nn.relu(nn.Conv(8, (3, 3))(images))
    return nn.Dense(7)(x.mean(axis=(1, 2)))


def find_front(mesh) -> dict:
  """What a few generations find and believe, and what is scored beside it."""
  draw = np.random.default_rng(0)
  images = draw.normal(size=(13, 8, 8, 3)).astype(np.float32)
  labels = draw.integers(0, 7, 13)
  network = Network()
  variables = network.init(jax.random.key(0), images[:1])
  quantized = quantize(network.apply, variables, images, calibration='min_max')
  problem = mixed_precision.make_problem(
    quantized,
    variables,
    images,
    labels,
    objectives=('divergence', 'size', 'bit_operations'),
    images_at_once=5,
    mesh=mesh,
    sensitivities=draw.random((4, 1)) / 4.0 ** np.arange(2, 9),
  )
  search = nemo.make(problem, [lagrangian.BUILDER], 10)
  state = search.init(jax.random.key(1))
  step, _ = search.compile(jax.random.key(2), state)
  for _ in range(4):
    state, metrics = step(state)
  accuracy = scoring.accuracy(
    quantized,
    variables,
    images,
    labels,
    np.asarray([[8] * 4, [3] * 4]),
    images_at_once=2,
    mesh=mesh,
  )
  belief = state.surrogate.belief._asdict()
  decided = state.archive._asdict() | belief | metrics
  return jax.tree.map(lambda x: np.asarray(x).tolist(), decided) | {
    'float': mixed_precision.float_objectives(problem, len(images)),
    'accuracy': accuracy.tolist(),
  }


def main(layouts) -> None:
  """Prints a line of JSON: what is found on each (devices, image devices)."""
  meshes = [
    devices.make_mesh(image_devices, jax.devices()[:count])
    for count, image_devices in layouts
  ]
  print(json.dumps([find_front(mesh) for mesh in meshes]))
