"""What a source of labelled images is, and how its classes get their labels."""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from nemo_jax.core.types import InputError

# What may serve for each role, the best first. Where training images alone are
# to be had, the caller divides them.
SPLITS = {
  'train': ('train',),
  'validation': ('validation', 'val', 'valid', 'test', 'train'),
}


class Example(NamedTuple):
  """One labelled image."""

  key: str  # what messages call it
  label: int
  content: Callable[[], bytes | np.ndarray]  # an encoded file, or pixels


class Source(NamedTuple):
  """Labelled images somewhere."""

  name: str
  identity: str  # differs when the content does
  size: int
  classes: dict[int, str]  # the names of the labels that there are
  examples: Callable[[int], Iterator[Example]]  # (seed) -> in random order


@functools.cache
def imagenet_classes() -> dict[str, int]:
  """The label of each of ImageNet's 1,000 WordNet ids, as in torchvision."""
  path = tfds.core.tfds_path('datasets/imagenet2012/labels.txt')
  return {name: i for i, name in enumerate(path.read_text().split())}


def labels_of(names: Sequence[str], num_classes: int, where: str) -> list[int]:
  """The network's label for each name of a class.

  ImageNet's are known by their WordNet ids, so that a part of them will do;
  others count in the order given.

  Raises:
    InputError: there are not as many as the network has.
  """
  known = imagenet_classes()
  if num_classes == len(known):
    unknown = [name for name in names if name not in known]
    if not unknown:
      return [known[name] for name in names]
    # By their place all names after an unknown one would get other labels.
    if len(unknown) < len(names) or len(names) != num_classes:
      raise InputError(
        f'{where} has the class {unknown[0]!r}, which is no WordNet id of '
        'ImageNet such as n01440764'
      )
  if len(names) != num_classes:
    raise InputError(
      f'{where} has {len(names)} classes; the network has {num_classes}'
    )
  return list(range(num_classes))


def _are_places(classes: dict[int, str]) -> bool:
  """Whether each class is named by the number of its label."""
  return all(
    name.isdecimal() and int(name) == label for label, name in classes.items()
  )


def check_same_classes(one: Source, other: Source) -> None:
  """Raises `InputError` where two sources have one label for two classes.

  Names that are no more than the numbers of the labels stand for any.
  """
  shared = one.classes.keys() & other.classes.keys()
  named = [not _are_places(source.classes) for source in (one, other)]
  numbers = [
    all(name.isdecimal() for name in source.classes.values())
    for source in (one, other)
  ]
  if not any(named) or (not all(named) and numbers[0] != numbers[1]):
    return
  for label in sorted(shared):
    pair = one.classes[label], other.classes[label]
    if pair[0] != pair[1]:
      raise InputError(
        f'class {label} is {pair[0]!r} in {one.name} and {pair[1]!r} in '
        f'{other.name}; both need the same classes'
      )


def shuffled(count: int, seed: int) -> np.ndarray:
  """The numbers below `count` in the order that a seed fixes."""
  return np.random.default_rng(seed).permutation(count)


def stamp(path: str, stat: os.stat_result) -> bytes:
  """The path, size and times of a file, which is not read.

  A file that is written over in place has another time even if its time of
  modification is set back: the time of the inode's change cannot be set.
  """
  times = f'{stat.st_mtime_ns} {stat.st_ctime_ns}'
  return os.fsencode(path) + f'\0{stat.st_size} {times}\0'.encode()
