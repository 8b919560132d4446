"""Decoded samples of a source, kept in a cache."""

import contextlib
import hashlib
import io
import json
import os
import pathlib
import shutil
import warnings
from collections.abc import Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import PIL
import tqdm

from nemo_jax.core import files
from nemo_jax.core.types import InputError
from nemo_jax.data import Example, Source
from nemo_jax.data.decoding import decode, preprocess
from nemo_jax.data.drawing import Drawn, draw
from nemo_jax.data.labelled import Images

__all__ = [
  'Images',
  'Sample',
  'check_disjoint',
  'decode',
  'draw',
  'preprocess',
  'samples',
]

_LAYOUT = 2  # version of the cache; files of other versions are not read
_MANIFEST = 'manifest.json'
_STEMS = ('images', 'labels', 'digests')  # of the files of a sample


class Sample(NamedTuple):
  """Images, with digests by which copies are found."""

  images: Images
  digests: np.ndarray  # [B, 16] uint8, of the decoded images


def _sha256(path: pathlib.Path) -> str:
  """SHA-256 of a file, in hex."""
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def _write_header(file: BinaryIO, count: int, crop: int) -> None:
  """Writes the header of an .npy with `count` images of sides `crop`."""
  # NumPy leaves room in the header for any count: it can be written first, and
  # again when the count is known.
  file.seek(0)
  shape = (count, crop, crop, 3)
  header = {'descr': '|u1', 'fortran_order': False, 'shape': shape}
  np.lib.format.write_array_header_1_0(file, header)


def _save(path: pathlib.Path, array: np.ndarray) -> None:
  """Writes an array as .npy."""
  # `numpy.save` into a file hides the error number of the operating system.
  content = io.BytesIO()
  np.save(content, array)
  path.write_bytes(content.getvalue())


def _warnings(
  source: Source, left_out: int, contrary: Sequence[str]
) -> list[str]:
  """Warnings about copies in a source, one for each kind."""
  lines = []
  if left_out:
    lines.append(
      f'{source.name}: left out {left_out} images that are copies of images in '
      'another sample'
    )
  if contrary:
    lines.append(
      f'{source.name}: {len(contrary)} images are copies of one with another '
      f'label, such as {contrary[0]}'
    )
  return lines


def _both_labels(source: Source, drawn: Drawn) -> str:
  """A copy and its first image with their classes, for a warning."""
  key, label = drawn.first
  names = [source.classes.get(x, x) for x in (drawn.example.label, label)]
  return f'{drawn.example.key} ({names[0]}) and {key} ({names[1]})'


def _decode_all(
  source: Source,
  even: int,
  others: Sequence[int | None],
  seed: int,
  resize: int,
  crop: int,
  folder: pathlib.Path,
) -> list[str]:
  """Decodes samples into files of the folder; returns the warnings."""
  counts = [even, *others]
  labels, digests = ([[] for _ in counts] for _ in range(2))
  left_out, contrary = 0, []

  def look(example: Example) -> tuple[tuple[np.ndarray, bytes], bytes]:
    pixels, digest = decode(example, resize, crop)
    return (pixels, digest), digest

  with contextlib.ExitStack() as stack:
    # Not memory maps: writing to one on a full disk ends the process.
    pixels = [
      stack.enter_context(open(folder / f'images{i}.npy', 'wb'))
      for i in range(len(counts))
    ]
    for file in pixels:
      _write_header(file, 0, crop)
    known = [count for count in counts if count is not None]
    total = source.size if None in counts else sum(known)
    title = f'decoding {source.name}'
    bar = stack.enter_context(tqdm.tqdm(total=total, desc=title, disable=None))
    every = contextlib.closing(draw(source, even, others, seed, look))
    for drawn in stack.enter_context(every):
      number, example = drawn.sample, drawn.example
      if example.label != drawn.first[1]:
        contrary.append(_both_labels(source, drawn))
      if number is None:
        left_out += 1
        continue
      image, digest = drawn.value
      pixels[number].write(image.tobytes())
      labels[number].append(example.label)
      digests[number].append(np.frombuffer(digest, np.uint8))
      bar.update()
    for file, found in zip(pixels, labels, strict=True):
      _write_header(file, len(found), crop)
  for i, found in enumerate(zip(labels, digests, strict=True)):
    _save(folder / f'labels{i}.npy', np.asarray(found[0], np.int32))
    rows = np.asarray(found[1], np.uint8).reshape(-1, 16)
    _save(folder / f'digests{i}.npy', rows)
  return _warnings(source, left_out, contrary)


def _write_manifest(
  folder: pathlib.Path, recipe: Sequence, lines: Sequence[str]
) -> None:
  """Writes recipe, warnings and digests of the files into the folder."""
  content = {'recipe': recipe, 'warnings': lines}
  content['files'] = {x.name: _sha256(x) for x in sorted(folder.iterdir())}
  text = json.dumps(files.seal(content))
  (folder / _MANIFEST).write_text(text, encoding='utf-8')


def _check(
  folder: pathlib.Path, recipe: Sequence, names: Sequence[str]
) -> list[str]:
  """The warnings in the manifest of a folder, after a check of its files.

  Raises:
    DamagedError: a file differs from what was written.
  """
  for name in (_MANIFEST, *names):
    if not (folder / name).is_file():
      raise files.DamagedError(f'{folder} is damaged: it has no {name}')
  manifest = files.read_json(folder / _MANIFEST)
  if not files.is_sealed(manifest) or manifest['recipe'] != recipe:
    raise files.DamagedError(f'{folder} is damaged: its manifest differs')
  for name in names:
    if _sha256(folder / name) != manifest['files'][name]:
      raise files.DamagedError(f'{folder} is damaged: {name} differs')
  return manifest['warnings']


def _read(folder: pathlib.Path, recipe: Sequence, count: int) -> list[Sample]:
  """The samples in a folder of the cache, as memory maps.

  Raises:
    DamagedError: a file differs from what was written.
  """
  names = [[f'{x}{i}.npy' for x in _STEMS] for i in range(count)]
  for line in _check(folder, recipe, sum(names, [])):
    warnings.warn(line, stacklevel=3)
  read = lambda name: np.load(folder / name, mmap_mode='r')
  arrays = [[read(name) for name in of_sample] for of_sample in names]
  return [Sample(Images(x, y), digests) for x, y, digests in arrays]


def samples(
  source: Source,
  even: int,
  others: Sequence[int | None] = (),
  *,
  seed: int = 0,
  resize: int = 256,
  crop: int = 224,
  cache: str | os.PathLike,
) -> list[Sample]:
  """The samples of `draw`, decoded, from a cache if they are in it.

  Files of the cache are checked; a damaged one is decoded again, with a
  warning.

  Args:
    source: from `data.open_source`.
    even: see `draw`.
    others: see `draw`.
    seed: see `draw`.
    resize: pixels of the short side before the crop; 0 for no scaling.
    crop: sides of the images in pixels.
    cache: a folder, whose files are mapped into memory.

  Returns:
    1 + len(others) samples.

  Raises:
    InputError: see `draw` and `decode`; or the cache cannot be written.
  """
  if resize and resize < crop:
    raise InputError(f'resize is {resize}; it must be 0, or {crop} and more')
  recipe: list[Any] = [_LAYOUT, PIL.__version__, source.identity]
  recipe += [even, list(others), seed, resize, crop]
  name = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]
  folder = files.local(cache) / f'images-{name}'
  count = 1 + len(others)
  with files.errors_named(folder):
    if folder.exists():
      try:
        return _read(folder, recipe, count)
      except files.DamagedError as error:
        warnings.warn(f'{error}; it is decoded again', stacklevel=2)
        shutil.rmtree(folder)
    with files.draft(folder, folder=True) as made:
      lines = _decode_all(source, even, others, seed, resize, crop, made)
      _write_manifest(made, recipe, lines)
    return _read(folder, recipe, count)


def check_disjoint(one: Sample, other: Sample) -> None:
  """Raises `InputError` if an image is in both samples."""
  first, second = ({d.tobytes() for d in s.digests} for s in (one, other))
  if shared := len(first & second):
    raise InputError(
      f'{shared} of the validation images are among those of the search'
    )
