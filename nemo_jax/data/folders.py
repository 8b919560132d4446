"""Source of images in class folders."""

import decimal
import hashlib
import os
import pathlib
import stat
import warnings
from collections.abc import Iterator, Sequence
from typing import NoReturn

from nemo_jax.core.types import InputError
from nemo_jax.data.source import (
  Example,
  Source,
  imagenet_classes,
  labels_of,
  shuffled,
  stamp,
)

# torchvision's IMG_EXTENSIONS.
SUFFIXES = (
  '.jpg',
  '.jpeg',
  '.png',
  '.ppm',
  '.bmp',
  '.pgm',
  '.tif',
  '.tiff',
  '.webp',
)


def _printable(path: str) -> str:
  """The path for messages, without control characters."""
  return path if path.isprintable() else repr(path)


def _number(name: str) -> decimal.Decimal | None:
  """The number that a name reads as; None if it is no number."""
  try:
    number = decimal.Decimal(name.strip())
  except decimal.InvalidOperation:
    return None
  return number if number.is_finite() and '_' not in name else None


def _in_order(names: Sequence[str], where: str) -> list[str]:
  """Names sorted by number if all are numbers, else as text.

  Raises:
    InputError: two names are the same number.
  """
  names = sorted(names)
  values = [_number(name) for name in names]
  if None in values:
    return names
  numbers = {}
  for name, value in zip(names, values, strict=True):
    other = numbers.setdefault(value, name)
    if other != name:
      raise InputError(
        f'{where} has the classes {other} and {name}, which are one number'
      )
  return [numbers[number] for number in sorted(numbers)]


def _files_below(folder: str) -> list[tuple[str, str]]:
  """Sorted (folder, name) of all files that are not hidden, at any depth.

  Links are followed, but each folder is read once: a link may lead back.
  """

  def fail(error: OSError) -> NoReturn:
    raise error

  found, seen = [], set()
  for here, folders, names in os.walk(folder, onerror=fail, followlinks=True):
    place = os.stat(here)
    if (place.st_dev, place.st_ino) in seen:
      folders.clear()
      continue
    seen.add((place.st_dev, place.st_ino))
    folders[:] = sorted(x for x in folders if not x.startswith('.'))
    found += [(here, x) for x in names if not x.startswith('.')]
  return sorted(found)


def _images_below(folder: str) -> tuple[dict[str, os.stat_result], list[str]]:
  """The images below a folder by path, and the paths of other files."""
  images, others = {}, []
  for place in _files_below(folder):
    file = os.path.join(*place)
    # Regular files only: reading a pipe would block for ever.
    if file.lower().endswith(SUFFIXES) and (
      stat.S_ISREG((found := os.stat(file)).st_mode)
    ):
      images[file] = found
    else:
      others.append(file)
  return images, others


def _warn_of(left_out: Sequence[str], root: str) -> None:
  """Warns of files that are no images in class folders."""
  if left_out:
    files = 'a file' if len(left_out) == 1 else f'{len(left_out)} files'
    example = _printable(os.path.relpath(left_out[0], root))
    warnings.warn(
      f'left out {files} in {root} that are no images in class folders, such '
      f'as {example}; images are {", ".join(SUFFIXES)}',
      stacklevel=4,
    )


def _listed(path: pathlib.Path) -> tuple[list[str], list[str]]:
  """Names of the class folders, in order, and paths of images beside them."""
  inside = [x for x in path.iterdir() if not x.name.startswith('.')]
  folders = [x.name for x in inside if x.is_dir()]
  beside = [
    str(x) for x in inside if x.name.lower().endswith(SUFFIXES) and x.is_file()
  ]
  return _in_order(folders, str(path)), sorted(beside)


def from_folders(path: pathlib.Path, num_classes: int) -> Source:
  """Source of images in a folder for each class, as torchvision's ImageFolder.

  The classes are in the order of the folders' names; of the numbers, if all
  names are numbers. Hidden files are skipped, and a warning counts other files
  that are left out.

  Args:
    path: of the folder with the class folders.
    num_classes: of the network.

  Raises:
    InputError: a class has no image, or the classes do not fit the network.
  """
  names, left_out = _listed(path)
  if not names and num_classes == len(imagenet_classes()):
    raise InputError(f'{path} holds no folder for any class')
  labels = labels_of(names, num_classes, str(path))
  files, sha = [], hashlib.sha256()
  for label, name in zip(labels, names, strict=True):
    images, others = _images_below(str(path / name))
    if not images:
      raise InputError(
        f'{path / name} holds no image; known are {", ".join(SUFFIXES)}'
      )
    left_out += others
    for file, found in images.items():
      files.append((label, file))
      sha.update(stamp(file, found))
  _warn_of(left_out, str(path))

  def examples(seed: int) -> Iterator[Example]:
    for i in shuffled(len(files), seed):
      label, file = files[i]
      yield Example(_printable(file), label, pathlib.Path(file).read_bytes)

  return Source(
    name=str(path),
    identity=f'{path.resolve()} {sha.hexdigest()}',
    size=len(files),
    classes=dict(zip(labels, names, strict=True)),
    examples=examples,
  )
