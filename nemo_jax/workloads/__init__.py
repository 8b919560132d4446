"""Trained networks with images: one file a workload, found by its name.

A workload file has three functions: `network(image_size)` returns a `Network`,
`check(sources)` refuses sources that the network does not take, and
`load(sources)` returns a `Workload`. A path that ends in `.py`, or a module
with a dot, names a workload of the user's own.
"""

import os
import sys
from types import ModuleType
from typing import NamedTuple

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
  """Where a workload comes from, and how much of it is taken.

  A field that is None leaves the choice to the workload.
  """

  cache: str | os.PathLike  # a folder for what is costly to make or to fetch
  weights: str | None = None  # a checkpoint
  data: str | None = None  # training images, see data.open_source
  validation: str | None = None  # images for the end, likewise
  image_size: int | None = None  # sides in pixels
  resize: int | None = None  # short side of training images before the crop
  validation_resize: int | None = None  # of the others
  search_images: int | None = None  # that score candidates
  calibration_images: int | None = None
  test_images: int | None = None  # that score the front, at the end
  image_seed: int | None = None  # of which images are taken


class Workload(NamedTuple):
  """A trained network, and images for three uses that share none."""

  name: str
  apply: Apply  # (variables, images) -> logits
  variables: PyTree
  calibration: Images  # sets the ranges of the quantizers
  search: Images  # scores candidates
  test: Images | None  # scores the front, once, at the end


def unseen(workload: Workload) -> Images:
  """The images that score a front at the end.

  Raises:
    InputError: the workload has none.
  """
  if workload.test is None:
    raise InputError(f'the workload {workload.name} has no test images')
  return workload.test


def names() -> list[str]:
  """The names of all workloads."""
  return plugins.names(sys.modules[__name__])


def find(name: str) -> ModuleType:
  """The module of a workload.

  Raises:
    InputError: the name is unknown, or the file is no workload.
  """
  needed = 'network', 'check', 'load'
  return plugins.find(sys.modules[__name__], 'workload', name, needed)


def short_name(name: str) -> str:
  """The name of a workload in results and folders."""
  return plugins.short_name(name)


def network(name: str, image_size: int | None = None) -> Network:
  """The network of a workload, to be traced; nothing is allocated.

  Raises:
    InputError: the name is unknown, or the size is not for this network.
  """
  return find(name).network(image_size)


def check(name: str, cache: str | os.PathLike, **sources) -> None:
  """Raises `InputError` for sources that contradict; takes what `load` takes.

  Nothing is read, trained or downloaded.
  """
  find(name).check(Sources(cache, **sources))


def load(name: str, cache: str | os.PathLike, **sources) -> Workload:
  """The workload of that name.

  Args:
    name: see `names`.
    cache: folder for what is costly to make, such as trained weights.
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
