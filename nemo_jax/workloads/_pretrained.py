"""Workloads with published weights, on images that the user provides."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, UInt8

from nemo_jax import data
from nemo_jax.core.types import Array, ArrayLike, InputError, PyTree
from nemo_jax.data import images
from nemo_jax.models import weights
from nemo_jax.workloads import Network, Sources, Workload

CALIBRATION_IMAGES = 256
# Mean and deviation of ImageNet's pixels in [0, 1], with which torchvision's
# networks and the ResNet-20 for CIFAR are trained.
MEAN = (0.485, 0.456, 0.406)
DEVIATION = (0.229, 0.224, 0.225)


class Recipe(NamedTuple):
  """The parameters of a pretrained workload."""

  name: str
  model: nn.Module
  num_classes: int
  image_size: int
  resize: int  # pixels of the short side before the crop to image_size
  search_images: int  # number of images that score candidates
  url: str | None  # of the official weights


IMAGENET = {
  'num_classes': 1000,
  'image_size': 224,
  'resize': 256,
  'search_images': 5000,
}


def _by_channel(values: Sequence[float]) -> Float[Array, '3']:
  """The values as float32, made of scalars of the program.

  A captured array would count as a parameter that the network stores.
  """
  channel = jnp.arange(3)
  return functools.reduce(
    jnp.add,
    [
      jnp.where(channel == i, x, 0.0).astype(jnp.float32)
      for i, x in enumerate(values)
    ],
  )


def normalise(pixels: UInt8[ArrayLike, 'B H W 3']) -> Float[Array, 'B H W 3']:
  """Images as the networks expect them, float32, from pixels."""
  images = pixels.astype(jnp.float32) / 255
  return (images - _by_channel(MEAN)) / _by_channel(DEVIATION)


def network(recipe: Recipe, image_size: int | None) -> Network:
  """The network of a recipe, as a function of uint8 pixels.

  Pixels are normalised in the function, and so on the device.

  Args:
    recipe: of the workload.
    image_size: sides in pixels; those of the recipe if None.

  Raises:
    InputError: the images are too small.
  """
  size = image_size or recipe.image_size
  if size < 32:
    raise InputError(f'image_size is {size}; {recipe.name} needs 32 or more')

  def apply(variables: PyTree, pixels: Array) -> PyTree:
    return recipe.model.apply(variables, normalise(pixels))

  shape = jax.ShapeDtypeStruct((1, size, size, 3), jnp.uint8)
  floats = jax.ShapeDtypeStruct(shape.shape, jnp.float32)
  # The key is inside the traced function, so nothing is computed.
  init = lambda images: recipe.model.init(jax.random.key(0), images)
  variables = jax.eval_shape(init, floats)
  return Network(apply, variables, shape)


def check(recipe: Recipe, sources: Sources) -> None:
  """Raises `InputError` if the weights or the images are not given."""
  if not (sources.weights or recipe.url):
    raise InputError(
      f'{recipe.name} has no official weights; name a checkpoint with --weights'
    )
  if not sources.data:
    raise InputError(
      f'{recipe.name} needs images: name a folder or a TFDS data set with '
      '--data'
    )


def _read_weights(recipe: Recipe, sources: Sources, shapes: PyTree) -> PyTree:
  """Variables from the checkpoint of the sources, or the official one."""
  path = sources.weights
  if path is None:
    assert recipe.url is not None  # see `check`
    path = weights.download(recipe.url, sources.cache)
  return weights.convert(weights.read(path), shapes)


def _read_images(
  recipe: Recipe, sources: Sources, size: int
) -> tuple[images.Sample, images.Sample, images.Sample]:
  """Search, calibration and test images, with sides of `size` pixels."""
  assert sources.data is not None  # see `check`
  train = data.open_source(sources.data, 'train', recipe.num_classes)
  where = sources.validation or sources.data
  validation = data.open_source(where, 'validation', recipe.num_classes)
  data.check_same_classes(train, validation)
  search = sources.search_images
  search = recipe.search_images if search is None else search
  calibration = sources.calibration_images or CALIBRATION_IMAGES
  # The crop covers the same share of an image as in the recipe.
  resize = sources.resize
  if resize is None:
    resize = round(recipe.resize * size / recipe.image_size)
  seed = sources.image_seed or 0
  options: dict[str, Any] = {'crop': size, 'seed': seed, 'cache': sources.cache}
  rest = train.size - search - calibration
  divided = validation.identity == train.identity
  wanted = (sources.test_images or max(rest, 1)) if divided else 0
  if rest < wanted:
    raise InputError(
      f'{train.name} has {train.size} images; {search} for the search, '
      f'{calibration} to calibrate and {wanted} to test are asked for: '
      '--search_images, --calibration_images, --test_images'
    )
  if divided and sources.validation_resize is not None:
    raise InputError(
      f'{train.name} is divided, so its images are all scaled alike; '
      '--validation_resize is for validation images of their own'
    )
  if divided:
    # None takes all that are left, which may be fewer than `rest` if there are
    # copies.
    others = [calibration, sources.test_images or None]
    one, two, three = images.samples(
      train, search, others, resize=resize, **options
    )
    return one, two, three
  one, two = images.samples(
    train, search, [calibration], resize=resize, **options
  )
  own = sources.validation_resize
  options['resize'] = resize if own is None else own
  if sources.test_images:
    (test,) = images.samples(validation, sources.test_images, **options)
  else:
    _, test = images.samples(validation, 0, [validation.size], **options)
  for sample in (one, two):
    images.check_disjoint(sample, test)
  return one, two, test


def load(recipe: Recipe, sources: Sources) -> Workload:
  """The workload of a recipe, with its weights and images.

  Raises:
    InputError: weights or images are missing or do not fit the network.
  """
  check(recipe, sources)
  net = network(recipe, sources.image_size)
  variables = _read_weights(recipe, sources, net.variables)
  size = net.images.shape[1]
  search, calibration, test = _read_images(recipe, sources, size)
  return Workload(
    name=recipe.name,
    apply=net.apply,
    variables=variables,
    calibration=calibration.images,
    search=search.images,
    test=test.images,
  )
