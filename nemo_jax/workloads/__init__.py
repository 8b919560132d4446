"""Trained networks with images: one file a workload, found by its name.

A workload file has a function `load(cache)` that returns a `Workload`; `cache`
is a folder for what is costly to make, such as trained weights.
"""

import importlib
import os
import pkgutil
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from nemo_jax.base import Array, InputError, PyTree


class Images(NamedTuple):
  """Labelled images."""

  images: np.ndarray  # [B, height, width, channels]
  labels: np.ndarray  # [B] int32


class Workload(NamedTuple):
  """A trained network, and images for three uses that share none."""

  name: str
  apply: Callable[[PyTree, Array], Array]  # (variables, images) -> logits
  variables: PyTree
  train: Images  # trained on; calibrates the quantizers
  search: Images  # scores candidates
  test: Images  # scores the front, once, at the end


def names() -> list[str]:
  """The names of all workloads."""
  return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str, cache: str | os.PathLike) -> Workload:
  """The workload of that name, made or read from the folder `cache`.

  Raises:
    InputError: the name is unknown.
  """
  if name not in names():
    raise InputError(
      f'unknown workload {name!r}; the choices are {", ".join(names())}'
    )
  try:
    return importlib.import_module(f'{__name__}.{name}').load(cache)
  except OSError as error:
    raise InputError(f'cannot use {cache}: {error.strerror}') from error
