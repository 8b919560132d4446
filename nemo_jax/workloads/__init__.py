"""Workloads: trained networks with images, one file each, found by name.

A workload file has three functions: `network(image_size)` returns a `Network`,
`check(sources)` raises `InputError` for sources that the workload does not
take, and `load(sources)` returns a `Workload`. A name that is a path ending in
`.py`, or a module with a dot, is a workload of the user.
"""

import os
import sys
from types import ModuleType
from typing import Any, NamedTuple

import jax

from nemo_jax.core import plugins
from nemo_jax.core.files import errors_named
from nemo_jax.core.types import InputError, PyTree
from nemo_jax.data.labelled import Images
from nemo_jax.quantization.trace import finite
from nemo_jax.quantization.trace.tracing import Apply


class Network(NamedTuple):
  """A network without weights: enough to trace it."""

  apply: Apply  # (variables, images) -> logits
  variables: PyTree  # of jax.ShapeDtypeStruct
  images: jax.ShapeDtypeStruct  # [1, height, width, channels]


class Sources(NamedTuple):
  """Files that a workload is loaded from, and numbers of images.

  For a field that is None the workload has a default.
  """

  cache: str | os.PathLike  # folder for trained weights and decoded images
  weights: str | None = None  # a checkpoint
  data: str | None = None  # training images, see `data.open_source`
  validation: str | None = None  # test images, see `data.open_source`
  image_size: int | None = None  # sides in pixels
  resize: int | None = None  # short side of training images before the crop
  validation_resize: int | None = None  # short side of validation images
  search_images: int | None = None  # number of images that score candidates
  calibration_images: int | None = None  # number of images
  test_images: int | None = None  # number of images that score the front
  image_seed: int | None = None  # of the random choice of images


class Workload(NamedTuple):
  """A trained network, and three sets of images that share no image."""

  name: str
  apply: Apply  # (variables, images) -> logits
  variables: PyTree
  calibration: Images  # for the ranges of the quantizers
  search: Images  # for the scores of candidates
  test: Images | None  # for the final scores of the front


def unseen(workload: Workload) -> Images:
  """The test images of a workload.

  Raises:
    InputError: the workload has none.
  """
  if workload.test is None:
    raise InputError(f'the workload {workload.name} has no test images')
  return workload.test


def names() -> list[str]:
  """The names of the workloads in this package, sorted."""
  return plugins.names(sys.modules[__name__])


def find(name: str) -> ModuleType:
  """The module of the workload of that name.

  Raises:
    InputError: the name is unknown, or the file is no workload.
  """
  needed = 'network', 'check', 'load'
  return plugins.find(sys.modules[__name__], 'workload', name, needed)


def short_name(name: str) -> str:
  """The name of a workload in results and folders."""
  return plugins.short_name(name)


def network(name: str, image_size: int | None = None) -> Network:
  """The network of a workload, without weights; no array is allocated.

  Args:
    name: see `find`.
    image_size: sides in pixels; those of the workload if None.

  Raises:
    InputError: the name is unknown, or the network cannot take the size.
  """
  return find(name).network(image_size)


def check(name: str, cache: str | os.PathLike, **sources: Any) -> None:
  """Raises `InputError` for sources that the workload does not take.

  Nothing is read, trained or downloaded. Arguments as for `load`.
  """
  find(name).check(Sources(cache, **sources))


def load(name: str, cache: str | os.PathLike, **sources: Any) -> Workload:
  """The workload of that name, with its weights and images.

  Args:
    name: see `find`.
    cache: folder for trained weights, downloads and decoded images.
    **sources: further fields of `Sources`.

  Raises:
    InputError: the name is unknown, or a source cannot be used.
  """
  module = find(name)
  with errors_named(cache):
    workload = module.load(Sources(cache, **sources))
  if bad := finite.bad_variables(workload.variables):
    raise InputError(
      f'{bad[0]} of {workload.name} holds values that are not finite'
    )
  return workload
