"""`Source` of labelled images, and the labels of its classes."""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from nemo_jax.core.types import InputError

# Names of splits for each role, in order of preference. If there are training
# images only, the caller divides them.
SPLITS = {
  'train': ('train',),
  'validation': ('validation', 'val', 'valid', 'test', 'train'),
}


class Example(NamedTuple):
  """One labelled image."""

  key: str  # its name in messages
  label: int
  content: Callable[[], bytes | np.ndarray]  # an encoded file, or pixels


class Source(NamedTuple):
  """Labelled images that can be read in any random order."""

  name: str
  identity: str  # differs if the content does
  size: int
  classes: dict[int, str]  # names by label, of the classes with images
  examples: Callable[[int], Iterator[Example]]  # (seed) -> in random order


@functools.cache
def imagenet_classes() -> dict[str, int]:
  """The label of each of ImageNet's 1,000 WordNet ids, as in torchvision."""
  path = tfds.core.tfds_path('datasets/imagenet2012/labels.txt')
  return {name: i for i, name in enumerate(path.read_text().split())}


def labels_of(names: Sequence[str], num_classes: int, where: str) -> list[int]:
  """The network's label for each name of a class.

  Classes of ImageNet are known by their WordNet ids, so there may be fewer than
  1,000. Other classes are numbered in the given order.

  Args:
    names: of the classes.
    num_classes: of the network.
    where: name of the source, for messages.

  Raises:
    InputError: the number of classes is not that of the network.
  """
  known = imagenet_classes()
  if num_classes == len(known):
    unknown = [name for name in names if name not in known]
    if not unknown:
      return [known[name] for name in names]
    # Numbered in order, all names after an unknown one would get other labels.
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
  """Whether the name of each class is the number of its label."""
  return all(
    name.isdecimal() and int(name) == label for label, name in classes.items()
  )


def check_same_classes(one: Source, other: Source) -> None:
  """Raises `InputError` if a label has different names in two sources.

  Sources whose names are the numbers of the labels agree with any other.
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
  """A random permutation of 0 to count - 1, from a seed."""
  return np.random.default_rng(seed).permutation(count)


def stamp(path: str, stat: os.stat_result) -> bytes:
  """Path, size and times of a file, by which a change is found.

  The content is not read. The time of modification can be set back after a
  change; the time of the inode's change cannot.
  """
  times = f'{stat.st_mtime_ns} {stat.st_ctime_ns}'
  return os.fsencode(path) + f'\0{stat.st_size} {times}\0'.encode()
