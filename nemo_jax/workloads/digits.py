"""Handwritten digits (8 x 8, grey) and a small residual network.

The 1,797 images are bundled with scikit-learn, so nothing is downloaded. The
network has every kind of layer that larger networks have: standard, depthwise
and pointwise convolutions, two residual additions, pooling and a dense layer.
It is trained on first use, which takes seconds.
"""

import hashlib
import json
import os
import pathlib
from typing import NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import sklearn.datasets
import sklearn.model_selection
import tqdm
from jaxtyping import Float

from nemo_jax.core import files
from nemo_jax.core.types import Array, InputError, PyTree
from nemo_jax.data.labelled import Images
from nemo_jax.workloads import Network, Sources, Workload

NUM_CLASSES = 10
CALIBRATION_IMAGES = 256


class DigitsNet(nn.Module):
  """Logits [B, 10] of images [B, 8, 8, 1]; 20 quantizers, 0.4 M MACs."""

  @nn.compact
  def __call__(self, images: Float[Array, 'B 8 8 1']) -> Float[Array, 'B 10']:
    """Applies the network; every layer has a bias and there are no norms."""
    conv = lambda features, size, name, **kw: nn.Conv(
      features, (size, size), name=name, **kw
    )
    x = nn.relu(conv(16, 3, 'stem')(images))
    y = nn.relu(conv(16, 3, 'block1_conv1')(x))
    x = nn.relu(x + conv(16, 3, 'block1_conv2')(y))
    y = nn.relu(conv(32, 1, 'block2_expand')(x))
    y = conv(32, 3, 'block2_depthwise', strides=2, feature_group_count=32)(y)
    x = conv(32, 1, 'block2_project')(nn.relu(y))
    y = nn.relu(conv(64, 1, 'block3_expand')(x))
    y = nn.relu(conv(64, 3, 'block3_depthwise', feature_group_count=64)(y))
    x = x + conv(32, 1, 'block3_project')(y)
    return nn.Dense(NUM_CLASSES, name='classifier')(jnp.mean(x, axis=(1, 2)))


def split() -> tuple[Images, Images, Images]:
  """Training, search and test images: 1,000, 400 and 397, stratified.

  Pixels are float32 in [0, 1].
  """
  data = sklearn.datasets.load_digits()
  images = (data.images[..., None] / 16).astype(np.float32)
  labels = data.target.astype(np.int32)
  divide = sklearn.model_selection.train_test_split
  train, rest, train_labels, rest_labels = divide(
    images, labels, train_size=1000, stratify=labels, random_state=0
  )
  search, test, search_labels, test_labels = divide(
    rest, rest_labels, train_size=400, stratify=rest_labels, random_state=0
  )
  return (
    Images(train, train_labels),
    Images(search, search_labels),
    Images(test, test_labels),
  )


def shifted(
  key: Array, images: Float[Array, 'B H W C']
) -> Float[Array, 'B H W C']:
  """Images shifted at random by up to one pixel each way, padded with zeros."""
  padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
  corners = jax.random.randint(key, (images.shape[0], 2), 0, 3)
  cut = lambda image, corner: jax.lax.dynamic_slice(
    image, (corner[0], corner[1], 0), images.shape[1:]
  )
  return jax.vmap(cut)(padded, corners)


class Training(NamedTuple):
  """The parameters of training, which name the file of the weights."""

  # Increased when a change of the code changes the trained weights.
  version: int = 1
  seed: int = 0
  epochs: int = 50
  batch_size: int = 50
  learning_rate: float = 6e-3  # maximum, after a tenth of the steps
  weight_decay: float = 1e-3
  smoothing: float = 0.05  # of the labels


def train(images: Images, recipe: Training) -> PyTree:
  """Variables of a `DigitsNet`, trained by AdamW with a cosine schedule.

  Args:
    images: to train on, B of them.
    recipe: of the training.
  """
  key = jax.random.key(recipe.seed)
  network = DigitsNet()
  steps = len(images.labels) // recipe.batch_size
  total = recipe.epochs * steps
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, recipe.learning_rate, total // 10, total
  )
  optimizer = optax.adamw(schedule, weight_decay=recipe.weight_decay)
  variables = network.init(key, images.images[:1])

  def loss(variables: PyTree, x: Array, y: Array) -> Array:
    logits = jnp.asarray(network.apply(variables, x))
    one_hot = jax.nn.one_hot(y, NUM_CLASSES)
    labels = optax.smooth_labels(one_hot, recipe.smoothing)
    return jnp.mean(optax.softmax_cross_entropy(logits, labels))

  # Not a scan over steps, in which XLA runs convolutions on one core.
  @jax.jit
  def update(
    variables: PyTree, state: PyTree, key: Array, rows: Array
  ) -> tuple[PyTree, PyTree, Array]:
    x = shifted(key, jnp.asarray(images.images)[rows])
    y = jnp.asarray(images.labels)[rows]
    value, gradient = jax.value_and_grad(loss)(variables, x, y)
    updates, state = optimizer.update(gradient, state, variables)
    return optax.apply_updates(variables, updates), state, value

  state = optimizer.init(variables)
  bar = tqdm.trange(recipe.epochs, desc='training', unit='epoch', disable=None)
  for epoch in bar:
    order_key, shift_key = jax.random.split(jax.random.fold_in(key, epoch))
    order = jax.random.permutation(order_key, len(images.labels))
    for i in range(steps):
      rows = order[i * recipe.batch_size : (i + 1) * recipe.batch_size]
      step_key = jax.random.fold_in(shift_key, i)
      variables, state, value = update(variables, state, step_key, rows)
    bar.set_postfix(loss=f'{value:.3f}')
  return variables


def _weights_file(
  cache: str | os.PathLike, images: Images, recipe: Training
) -> pathlib.Path:
  """Path of the trained weights, named by a digest of what they depend on."""
  shapes = flax.traverse_util.flatten_dict(network().variables, sep='/')
  shapes = {name: list(leaf.shape) for name, leaf in shapes.items()}
  decisive = recipe._asdict(), shapes, files.digest(images)
  text = json.dumps(decisive, sort_keys=True)
  digest = hashlib.sha256(text.encode()).hexdigest()[:12]
  return files.local(cache) / f'digits-{digest}.npz'


def network(image_size: int | None = None) -> Network:
  """The network without weights.

  Raises:
    InputError: `image_size` is neither None nor 8.
  """
  if image_size not in (None, 8):
    raise InputError(f'image_size is {image_size}; digits are 8 x 8')
  images = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)
  # The key is inside the traced function, so nothing is computed.
  init = lambda images: DigitsNet().init(jax.random.key(0), images)
  shapes = jax.eval_shape(init, images)
  return Network(DigitsNet().apply, shapes, images)


def check(sources: Sources) -> None:
  """Raises `InputError` if weights or images are given."""
  for name, value in sources._asdict().items():
    # 0 is allowed: it stands for no scaling, or for no search images.
    if name != 'cache' and value:
      raise InputError(
        f'digits has weights and images of its own; it takes no --{name}'
      )


def load(sources: Sources) -> Workload:
  """The workload; trained on first use, with the weights kept in the cache.

  If the cached weights are damaged they are trained again, which gives the same
  bits on the same machine.

  Raises:
    InputError: weights or images are given, or the cache cannot be used.
  """
  check(sources)
  train_images, search, test = split()
  recipe = Training()

  def make() -> dict[str, np.ndarray]:
    variables = jax.device_get(train(train_images, recipe))
    return flax.traverse_util.flatten_dict(variables, sep='/')

  path = _weights_file(sources.cache, train_images, recipe)
  variables = flax.traverse_util.unflatten_dict(
    files.cached(path, make), sep='/'
  )
  first = slice(CALIBRATION_IMAGES)
  return Workload(
    name='digits',
    apply=DigitsNet().apply,
    variables=variables,
    calibration=Images(train_images.images[first], train_images.labels[first]),
    search=search,
    test=test,
  )
