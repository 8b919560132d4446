"""Decoding of images, and preprocessing as in torchvision's evaluations."""

import hashlib
import io

import numpy as np
import PIL.Image

from nemo_jax.core.types import InputError, first_line
from nemo_jax.data.source import Example

# Most pixels of a scaled image: as many as Pillow opens without a warning.
_MAX_PIXELS = 89_478_485
_TIFF_BITS, _TIFF_COMPRESSION, _TIFF_PHOTOMETRIC = 258, 259, 262
_TIFF_LARGEST, _TIFF_PLANES, _TIFF_FORMAT = 281, 284, 339


def _tag(image: PIL.Image.Image, number: int, default: int) -> int:
  """Value of a tag of a TIFF, the largest if there are several."""
  value = getattr(image, 'tag_v2', {}).get(number, default)
  return max(value, default=default) if isinstance(value, tuple) else value


def _check_tiff(image: PIL.Image.Image) -> None:
  """Raises `InputError` for a TIFF whose pixels Pillow would misread."""
  if _tag(image, _TIFF_FORMAT, 1) == 2 and image.mode == 'L':
    raise InputError('its pixels are signed numbers; convert it to unsigned')
  planes = _tag(image, _TIFF_PLANES, 1) == 2
  wide = _tag(image, _TIFF_BITS, 8) > 8
  if planes and wide and _tag(image, _TIFF_COMPRESSION, 1) == 1:
    raise InputError(
      'its channels of more than 8 bits are in planes; save it with the '
      'channels of a pixel together, or compressed'
    )


def _largest_grey(image: PIL.Image.Image) -> int:
  """The value of white in a grey image of more than eight bits.

  Raises:
    InputError: the value is not known.
  """
  if image.mode.startswith('I;16'):
    if image.format == 'TIFF':
      stated = _tag(image, _TIFF_LARGEST, 0)
      return stated or 2 ** image.tag_v2[_TIFF_BITS][0] - 1  # ty: ignore[missing-attribute]
    return 65535
  # Pillow opens 16 bits as 32 here, and scales other depths to 16.
  if image.mode == 'I' and image.format in ('PNG', 'PPM'):
    return 65535
  kind = 'floats' if image.mode == 'F' else 'signed or 32-bit numbers'
  raise InputError(
    f'its pixels are {kind}, whose range is not known; convert it to 8 or 16 '
    'bits'
  )


def _as_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
  """The image as RGB with eight bits a channel, without transparency.

  Grey images of 16 bits are divided by 257; Pillow would clip them.

  Raises:
    InputError: the range of its values is not known.
  """
  if image.mode in ('I', 'F') or image.mode.startswith('I;16'):
    white = _largest_grey(image)
    grey = np.asarray(image).astype(np.float64) / white
    tags = getattr(image, 'tag_v2', {})
    if tags and tags.get(_TIFF_PHOTOMETRIC, 0) == 0:
      grey = 1 - grey  # 0 is white; Pillow handles this in 8 bits only
    image = PIL.Image.fromarray(np.rint(255 * grey).astype(np.uint8))
  return image if image.mode == 'RGB' else image.convert('RGB')


def preprocess(image: PIL.Image.Image, resize: int, crop: int) -> np.ndarray:
  """uint8[crop, crop, 3] pixels, preprocessed as in torchvision's evaluations.

  The short side is scaled to `resize`, bilinearly and with antialiasing, and
  the centre is cropped. Grey and CMYK images become RGB.

  Args:
    image: of any size and mode.
    resize: pixels of the short side; 0 crops the image without scaling.
    crop: sides of the crop in pixels.

  Raises:
    InputError: an image without scaling is too small, one with scaling is too
      long, or the range of the values is not known.
  """
  image = _as_rgb(image)
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
    if scaled * resize > _MAX_PIXELS:
      raise InputError(
        f'it is {image.width} x {image.height}, and would be {size[0]} x '
        f'{size[1]} when it is scaled'
      )
    image = image.resize(size, PIL.Image.Resampling.BILINEAR)
  # torchvision rounds half a pixel to the even number.
  left, top = (round((side - crop) / 2) for side in image.size)
  return np.asarray(image.crop((left, top, left + crop, top + crop)))


def _open(content: bytes | np.ndarray) -> PIL.Image.Image:
  """The image in an encoded file or in an array of pixels."""
  if isinstance(content, np.ndarray):
    return PIL.Image.fromarray(content)
  image = PIL.Image.open(io.BytesIO(content))
  if image.format == 'EPS':
    raise InputError('it is PostScript, which is a program')
  if image.format == 'TIFF':
    _check_tiff(image)
  return image


def decode(
  example: Example, resize: int, crop: int
) -> tuple[np.ndarray, bytes]:
  """Pixels of an example, and a digest of the whole image in 16 bytes.

  The digest is of the decoded pixels before they are scaled. Copies of an image
  in other files or lossless formats have the same digest.

  Args:
    example: of a source.
    resize: see `preprocess`.
    crop: see `preprocess`.

  Raises:
    InputError: the image is damaged, or in no known format.
  """
  try:
    image = _as_rgb(_open(example.content()))
    sha = hashlib.sha256(f'{image.size}'.encode())
    sha.update(image.tobytes())
    return preprocess(image, resize, crop), sha.digest()[:16]
  except Exception as error:  # Pillow's decoders raise many kinds
    reason = first_line(error)
    if isinstance(error, PIL.UnidentifiedImageError):
      reason = 'it is in no format that Pillow knows'
    raise InputError(f'cannot decode {example.key}: {reason}') from error
