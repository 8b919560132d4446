"""Images, folders of them, and torchvision's way to cut them."""

import contextlib
import hashlib
import io

import numpy as np
import PIL.Image
import pytest

from nemo_jax import InputError, data

WNIDS = {'n01440764': 0, 'n01443537': 1, 'n02119789': 278}
TEN = tuple('jihgfedcba')


@contextlib.contextmanager
def refused(words):
  with pytest.raises(InputError, match=words) as caught:
    yield
  assert '\n' not in str(caught.value)


def noise(seed, height=40, width=50):
  generator = np.random.default_rng(seed)
  return generator.integers(0, 256, (height, width, 3), np.uint8)


def jpeg(seed):
  file = io.BytesIO()
  PIL.Image.fromarray(noise(seed)).save(file, 'JPEG')
  # All of one size, so that sizes alone tell nothing.
  return file.getvalue().ljust(4000, b'\0')


def class_folders(path, names=tuple(WNIDS)):
  """An image a class, and the folder of the classes."""
  for i, name in enumerate(names):
    (path / name).mkdir(parents=True)
    (path / name / f'{i}.JPEG').write_bytes(jpeg(i))
  return path


def read(where, role='train', num_classes=1000, seed=0):
  return list(data.open_source(str(where), role, num_classes).examples(seed))


def picture(width, height, mode='RGB', seed=0):
  """Noise: no two pixels are alike, so that a shift by one shows."""
  generator = np.random.default_rng(seed)
  pixels = generator.integers(0, 256, (height, width, 4), np.uint8)
  if mode in ('CMYK', 'RGBA'):
    return PIL.Image.frombytes(mode, (width, height), pixels.tobytes())
  image = PIL.Image.fromarray(np.ascontiguousarray(pixels[..., :3]))
  return image.quantize(16) if mode == 'P' else image.convert(mode)


def as_file(image, kind='PNG', **options):
  file = io.BytesIO()
  image.save(file, kind, **options)
  return file.getvalue()


def scaled_size(size, resize):
  """What torchvision.transforms.Resize(resize) makes of (width, height)."""
  short, long = min(size), max(size)
  return tuple(
    resize if side == short else int(resize * long / short) for side in size
  )


def torchvision(image, resize, crop):
  """Resize(resize), then CenterCrop(crop), of the image as RGB."""
  image = image.convert('RGB')
  size = scaled_size(image.size, resize)
  pixels = np.asarray(image.resize(size, PIL.Image.Resampling.BILINEAR))
  top = int(round((pixels.shape[0] - crop) / 2.0))
  left = int(round((pixels.shape[1] - crop) / 2.0))
  return pixels[top : top + crop, left : left + crop]


def arrays(**changes):
  whole = {
    'x': np.stack([noise(i, 8, 9) for i in range(30)]),
    'y': np.arange(30) % 10,
  }
  return {k: v for k, v in (whole | changes).items() if v is not None}


def need_tensorflow():
  for name in ('tensorflow', 'importlib_resources'):
    pytest.importorskip(name, reason='writing TFDS data needs TensorFlow')


def digest_of(image):
  """That of the size and the pixels as RGB."""
  image = image.convert('RGB')
  content = str(image.size).encode() + image.tobytes()
  return hashlib.sha256(content).digest()[:16]
