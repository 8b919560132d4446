"""Samples of a source, decoded once and kept in a cache."""

import collections
import concurrent.futures
import hashlib
import io
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import PIL.Image
import tqdm

from nemo_jax.base import InputError
from nemo_jax.data import Example, Source, first_line

_LAYOUT = 1  # of the cache; another number makes old ones unread


class Images(NamedTuple):
  """Labelled images."""

  images: np.ndarray  # [B, height, width, channels]
  labels: np.ndarray  # [B] int32


class Sample(NamedTuple):
  """Images, and what tells whether two are the same."""

  images: Images
  digests: np.ndarray  # [B, 16] uint8, of the encoded files


def preprocess(image: PIL.Image.Image, resize: int, crop: int) -> np.ndarray:
  """uint8[crop, crop, 3]: as torchvision evaluates.

  The short side is scaled to `resize`, bilinear and with antialiasing, and the
  centre cut out. Grey and CMYK images become RGB.

  Args:
    image: of any size and mode.
    resize: 0 cuts the centre out of the image as it is, for such as were
      scaled before.
    crop: sides of what is cut out.

  Raises:
    InputError: an image that is not to be scaled is too small.
  """
  image = image.convert('RGB')
  if not resize:
    if min(image.size) < crop:
      raise InputError(f'it is {image.width} x {image.height}')
    left, top = ((side - crop) // 2 for side in image.size)
    return np.asarray(image.crop((left, top, left + crop, top + crop)))
  short, long = sorted(image.size)
  if short != resize:
    scaled = int(resize * long / short)
    wide = image.width >= image.height
    size = (scaled, resize) if wide else (resize, scaled)
    image = image.resize(size, PIL.Image.Resampling.BILINEAR)
  # torchvision gives half a pixel to the even side.
  left, top = (round((side - crop) / 2) for side in image.size)
  return np.asarray(image.crop((left, top, left + crop, top + crop)))


def decode(example: Example, resize: int, crop: int):
  """An example's pixels, and a digest of its content.

  Raises:
    InputError: it is damaged or in no known format.
  """
  try:
    content = example.content()
    if isinstance(content, np.ndarray):
      image, data = PIL.Image.fromarray(content), content.tobytes()
    else:
      image, data = PIL.Image.open(io.BytesIO(content)), content
    pixels = preprocess(image, resize, crop)
  except Exception as error:  # Pillow's decoders raise many kinds
    reason = first_line(error)
    if isinstance(error, PIL.UnidentifiedImageError):
      reason = 'it is in no format that Pillow knows'
    raise InputError(f'cannot decode {example.key}: {reason}') from error
  return pixels, hashlib.sha256(data).digest()[:16]


def draw(
  source: Source, even: int, others: Sequence[int], seed: int
) -> Iterator[tuple[int, Example]]:
  """Disjoint random samples of a source: (number of the sample, example).

  Args:
    source: where from.
    even: images in sample 0, which has as many of one class as of another, or
      one more.
    others: images in the samples after it, which take what comes along.
    seed: of the order of the images, and of the classes that have one more.

  Raises:
    InputError: there are not enough images, of a class or in all.
  """
  each, more = divmod(even, len(source.classes))
  labels = np.random.default_rng(seed).permutation(sorted(source.classes))
  quotas = {int(x): each + (i < more) for i, x in enumerate(labels)}
  left = [sum(quotas.values()), *others]
  for example in source.examples(seed):
    if quotas.get(example.label):
      quotas[example.label] -= 1
      number = 0
    else:
      number = next((i for i, n in enumerate(left) if i and n), None)
    if number is not None:
      left[number] -= 1
      yield number, example
    if not any(left):
      return
  for label, missing in quotas.items():
    if missing:
      wanted = each + (label in labels[:more])
      raise InputError(
        f'{source.name} has {wanted - missing} images of class '
        f'{source.classes[label]}; {wanted} are asked for'
      )
  if any(left):
    raise InputError(
      f'{source.name} has {source.size} images; {sum([even, *others])} are '
      'asked for'
    )


def _decode_all(source, even, others, seed, resize, crop, folder) -> None:
  """Decodes samples, several at a time, into files of the folder."""
  counts = [even, *others]
  pixels = [
    np.lib.format.open_memmap(
      folder / f'images{i}.npy', 'w+', np.uint8, (count, crop, crop, 3)
    )
    for i, count in enumerate(counts)
  ]
  labels = [np.zeros(count, np.int32) for count in counts]
  digests = [np.zeros((count, 16), np.uint8) for count in counts]
  filled = [0 for _ in counts]
  threads = os.cpu_count() or 1
  with (
    concurrent.futures.ThreadPoolExecutor(threads) as pool,
    tqdm.tqdm(
      total=sum(counts), desc=f'decoding {source.name}', disable=None
    ) as bar,
  ):
    running = collections.deque()

    def finish():
      number, row, future = running.popleft()
      image, digest = future.result()
      pixels[number][row] = image
      digests[number][row] = np.frombuffer(digest, np.uint8)
      bar.update()

    for number, example in draw(source, even, others, seed):
      row = filled[number]
      filled[number] += 1
      labels[number][row] = example.label
      job = pool.submit(decode, example, resize, crop)
      running.append((number, row, job))
      # A bound on the encoded images that wait.
      if len(running) > 4 * threads:
        finish()
    while running:
      finish()
  for i in range(len(counts)):
    pixels[i].flush()
    np.save(folder / f'labels{i}.npy', labels[i])
    np.save(folder / f'digests{i}.npy', digests[i])


def samples(
  source: Source,
  even: int,
  others: Sequence[int] = (),
  *,
  seed: int = 0,
  resize: int = 256,
  crop: int = 224,
  cache: str | os.PathLike,
) -> list[Sample]:
  """The samples of `draw`, decoded; from the cache if they have been before.

  Args:
    source: from `data.open_source`.
    even: see `draw`.
    others: see `draw`.
    seed: see `draw`.
    resize: pixels of the short side before the crop, 0 to leave it.
    crop: pixels of the sides.
    cache: a folder; the files in it are mapped, not read.

  Raises:
    InputError: see `draw` and `decode`.
  """
  if resize and resize < crop:
    raise InputError(f'resize is {resize}; it must be 0, or {crop} and more')
  recipe = (_LAYOUT, source.identity, even, list(others), seed, resize, crop)
  name = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]
  folder = pathlib.Path(cache) / f'images-{name}'
  if not folder.exists():
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = pathlib.Path(tempfile.mkdtemp(dir=cache, prefix='.images-'))
    try:
      _decode_all(source, even, others, seed, resize, crop, draft)
      try:
        draft.rename(folder)
      except OSError:  # another process was faster
        if not folder.is_dir():
          raise
    finally:
      shutil.rmtree(draft, ignore_errors=True)
  read = lambda stem, i: np.load(folder / f'{stem}{i}.npy', mmap_mode='r')
  try:
    found = [
      Sample(Images(read('images', i), read('labels', i)), read('digests', i))
      for i in range(1 + len(others))
    ]
    for count, sample in zip([even, *others], found, strict=True):
      lengths = {len(x) for x in (*sample.images, sample.digests)}
      if lengths != {count}:
        raise ValueError(f'{count} images are {sorted(lengths)}')
  except Exception as error:  # NumPy raises many kinds
    raise InputError(
      f'{folder} is damaged ({first_line(error)}); delete it to decode again'
    ) from error
  return found


def check_disjoint(one: Sample, other: Sample) -> None:
  """Raises `InputError` if the same image is in both."""
  first, second = ({d.tobytes() for d in s.digests} for s in (one, other))
  if shared := len(first & second):
    raise InputError(
      f'{shared} of the validation images are among those of the search'
    )
