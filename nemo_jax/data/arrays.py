"""Images and labels in an .npz."""

import pathlib
from collections.abc import Iterator

import numpy as np

from nemo_jax.core import files
from nemo_jax.core.types import InputError, first_line
from nemo_jax.data.source import Example, Source, shuffled


def _read(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
  """The arrays x and y of an .npz."""
  try:
    stored = files.read_npz(path, ('x', 'y'))
  except files.DamagedError as error:
    reason = first_line(error.__cause__ or error)
    raise InputError(f'{path} holds no arrays x and y: {reason}') from error
  if missing := {'x', 'y'} - set(stored):
    raise InputError(
      f'{path} holds no arrays x and y: it has no {min(missing)}'
    )
  return stored['x'], stored['y']


def _check(
  path: pathlib.Path, pixels: np.ndarray, labels: np.ndarray, num_classes: int
) -> None:
  """Raises `InputError` unless these are pixels with a label for each image."""
  if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3:
    raise InputError(
      f'{path}: x is {pixels.dtype}{list(pixels.shape)}; pixels are '
      'uint8[B, H, W, 3]'
    )
  whole = np.issubdtype(labels.dtype, np.integer)
  if not whole or labels.shape not in ((len(pixels),), (len(pixels), 1)):
    raise InputError(
      f'{path}: y is {labels.dtype}{list(labels.shape)}; there are '
      f'{len(pixels)} images, with a whole number each'
    )
  if not len(labels):
    raise InputError(f'{path} holds no image')
  if labels.min() < 0 or labels.max() >= num_classes:
    culprit = labels.min() if labels.min() < 0 else labels.max()
    raise InputError(
      f'{path} has the label {culprit}; the network has {num_classes} classes'
    )


def from_arrays(path: pathlib.Path, num_classes: int) -> Source:
  """Source of the images in an .npz.

  Args:
    path: of a file with pixels `x` uint8[B, H, W, 3] and integers `y` [B] or
      [B, 1].
    num_classes: of the network.

  Raises:
    InputError: the file holds no such arrays, or a label is no class.
  """
  pixels, labels = _read(path)
  _check(path, pixels, labels, num_classes)
  labels = labels.ravel()

  def examples(seed: int) -> Iterator[Example]:
    for i in shuffled(len(labels), seed):
      yield Example(f'{path}[{i}]', int(labels[i]), lambda i=i: pixels[i])

  return Source(
    name=str(path),
    # The arrays are in memory, so the identity can depend on the content.
    identity=f'{path.resolve()} {files.digest([pixels, labels])}',
    size=len(labels),
    classes={int(label): str(label) for label in np.unique(labels)},
    examples=examples,
  )
