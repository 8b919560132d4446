"""Handwritten digits (8 x 8 grey) and a small residual network for them.

The 1,797 images are bundled with scikit-learn, so nothing is downloaded. The
network has a layer of every kind that larger ones have (standard, depthwise
and pointwise convolutions, two residual additions, pooling, a dense layer) and
is trained on first use, in seconds.
"""

import hashlib
import os
import pathlib
import tempfile

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import sklearn.datasets
import sklearn.model_selection
import tqdm

from nemo_jax.base import Array, InputError, PyTree
from nemo_jax.images import Images
from nemo_jax.workloads import Network, Sources, Workload

NUM_CLASSES = 10
CALIBRATION_IMAGES = 256


class DigitsNet(nn.Module):
  """Logits [B, 10] of images [B, 8, 8, 1]; 20 quantizers, 0.4 M MACs."""

  @nn.compact
  def __call__(self, images: Array) -> Array:
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
  """Training, search and test images: 1,000, 400 and 397, classes in balance.

  Pixels are scaled to [0, 1].
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


def shifted(key: Array, images: Array) -> Array:
  """Images moved by up to one pixel each way, the border filled with zeros."""
  padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
  corners = jax.random.randint(key, (images.shape[0], 2), 0, 3)
  cut = lambda image, corner: jax.lax.dynamic_slice(
    image, (corner[0], corner[1], 0), images.shape[1:]
  )
  return jax.vmap(cut)(padded, corners)


def train(
  images: Images, seed: int = 0, epochs: int = 50, batch_size: int = 50
) -> PyTree:
  """Variables of a `DigitsNet` trained by AdamW with a cosine schedule."""
  key = jax.random.key(seed)
  network = DigitsNet()
  steps = len(images.labels) // batch_size
  total = epochs * steps
  schedule = optax.warmup_cosine_decay_schedule(0.0, 6e-3, total // 10, total)
  optimizer = optax.adamw(schedule, weight_decay=1e-3)
  variables = network.init(key, images.images[:1])

  def loss(variables, x, y):
    logits = network.apply(variables, x)
    labels = optax.smooth_labels(jax.nn.one_hot(y, NUM_CLASSES), 0.05)
    return jnp.mean(optax.softmax_cross_entropy(logits, labels))

  # A step at a time: inside a scan XLA runs convolutions on one core.
  @jax.jit
  def update(variables, state, key, rows):
    x = shifted(key, jnp.asarray(images.images)[rows])
    y = jnp.asarray(images.labels)[rows]
    value, gradient = jax.value_and_grad(loss)(variables, x, y)
    updates, state = optimizer.update(gradient, state, variables)
    return optax.apply_updates(variables, updates), state, value

  state = optimizer.init(variables)
  bar = tqdm.trange(epochs, desc='training', unit='epoch', disable=None)
  for epoch in bar:
    order_key, shift_key = jax.random.split(jax.random.fold_in(key, epoch))
    order = jax.random.permutation(order_key, len(images.labels))
    for i in range(steps):
      rows = order[i * batch_size : (i + 1) * batch_size]
      step_key = jax.random.fold_in(shift_key, i)
      variables, state, value = update(variables, state, step_key, rows)
    bar.set_postfix(loss=f'{value:.3f}')
  return variables


def _weights_file(cache: str | os.PathLike) -> pathlib.Path:
  """Where weights are kept; named by this file's content, which made them."""
  source = pathlib.Path(__file__).read_bytes()
  digest = hashlib.sha256(source).hexdigest()[:12]
  return pathlib.Path(cache) / f'digits-{digest}.npz'


def _read(path: pathlib.Path) -> PyTree:
  """The variables in a file.

  Raises:
    InputError: it is damaged, or holds anything else.
  """
  shapes = network().variables
  try:
    with np.load(path, allow_pickle=False) as stored:
      variables = flax.traverse_util.unflatten_dict(dict(stored), sep='/')
    jax.tree.map(lambda x, like: x.reshape(like.shape), variables, shapes)
  except Exception as error:  # zipfile, zlib and NumPy raise many kinds
    reason = str(error).splitlines()[0]
    raise InputError(
      f'{path} is damaged ({reason}); delete it to train again'
    ) from error
  return variables


def network(image_size: int | None = None) -> Network:
  """The network, whose images are 8 x 8."""
  if image_size not in (None, 8):
    raise InputError(f'image_size is {image_size}; digits are 8 x 8')
  images = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)
  shapes = jax.eval_shape(DigitsNet().init, jax.random.key(0), images)
  return Network(DigitsNet().apply, shapes, images)


def load(sources: Sources) -> Workload:
  """The workload; trains on first use and keeps the weights in the cache.

  Raises:
    InputError: weights or images are given, or the kept weights are damaged.
  """
  for name, value in sources._asdict().items():
    # Nothing is asked for with 0: no scaling, or none for a search.
    if name != 'cache' and value:
      raise InputError(
        f'digits has weights and images of its own; it takes no {name}'
      )
  train_images, search, test = split()
  path = _weights_file(sources.cache)
  if path.exists():
    variables = _read(path)
  else:
    path.parent.mkdir(parents=True, exist_ok=True)
    variables = jax.device_get(train(train_images))
    flat = flax.traverse_util.flatten_dict(variables, sep='/')
    # Written aside and renamed, so that a kill leaves no half a file.
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
      np.savez(file, **flat)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
  first = slice(CALIBRATION_IMAGES)
  return Workload(
    name='digits',
    apply=DigitsNet().apply,
    variables=variables,
    calibration=Images(train_images.images[first], train_images.labels[first]),
    search=search,
    test=test,
  )
