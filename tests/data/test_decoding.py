"""Encoded images to pixels: how they are cut, scaled and refused."""

import io
import struct
import tarfile

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_jax import data
from nemo_jax.data import Example, images
from tests.pictures import (
  as_file,
  digest_of,
  picture,
  refused,
  scaled_size,
  torchvision,
)


@settings(max_examples=60)
@given(
  st.integers(1, 300),
  st.integers(0, 500),
  st.booleans(),
  st.sampled_from(['RGB', 'L', 'CMYK', 'RGBA', 'P']),
  st.sampled_from([(256, 224), (232, 224), (224, 224), (37, 32)]),
  st.integers(0, 9),
)
def test_images_are_cut_as_torchvision_cuts_them(
  short, more, wide, mode, sides, seed
):
  size = (short, short + min(more, 3 * short))
  image = picture(*(size[::-1] if wide else size), mode, seed)
  pixels = images.preprocess(image, *sides)
  assert pixels.dtype == np.uint8
  assert pixels.shape == (sides[1], sides[1], 3)
  np.testing.assert_array_equal(pixels, torchvision(image, *sides))


def test_real_images_are_within_a_step_of_torch(shared):
  torch = pytest.importorskip('torch')
  contents = [
    file.read_bytes()
    for file in sorted((shared / 'imagenet' / 'val').glob('*/*.JPEG'))[:3]
  ]
  with tarfile.open(shared / 'imagenet' / 'ILSVRC2012_img_train.tar') as outer:
    # Wide, high, large, tiny and greyscale ones.
    for wnid in ('n01630670', 'n01748264', 'n01688243', 'n01871265'):
      with tarfile.open(fileobj=outer.extractfile(f'{wnid}.tar')) as inner:
        (name,) = inner.getnames()
        contents.append(inner.extractfile(name).read())
  for content in contents:
    image = PIL.Image.open(io.BytesIO(content)).convert('RGB')
    width, height = scaled_size(image.size, 256)
    resized = torch.nn.functional.interpolate(
      torch.from_numpy(np.array(image)).permute(2, 0, 1)[None],
      size=(height, width),
      mode='bilinear',
      antialias=True,
    )
    top, left = round((height - 224) / 2), round((width - 224) / 2)
    expected = resized[0, :, top : top + 224, left : left + 224]
    pixels = images.preprocess(image, 256, 224)
    difference = pixels.astype(int) - expected.permute(1, 2, 0).numpy()
    assert np.abs(difference).max() <= 1


def columns(width, height):
  """An image whose pixels say where they are."""
  y, x = np.mgrid[:height, :width].astype(np.uint8)
  return PIL.Image.fromarray(np.stack([x, y, 0 * x], axis=-1))


@pytest.mark.parametrize(
  ('width', 'height', 'resize', 'left', 'top'),
  [
    (42, 40, 40, 5, 4),
    # Half a pixel goes to the even side ...
    (41, 40, 40, 4, 4),
    (43, 40, 40, 6, 4),
    (40, 43, 40, 4, 6),
    # ... but to the left and up where nothing is scaled.
    (41, 40, 0, 4, 4),
    (43, 40, 0, 5, 4),
    (40, 43, 0, 4, 5),
    (32, 32, 0, 0, 0),
  ],
)
def test_where_the_centre_is(width, height, resize, left, top):
  pixels = images.preprocess(columns(width, height), resize, 32)
  assert pixels.shape == (32, 32, 3)
  assert pixels[0, 0].tolist() == [left, top, 0]
  assert pixels[-1, -1].tolist() == [left + 31, top + 31, 0]


@pytest.mark.parametrize('size', [(31, 40), (40, 31)])
def test_an_image_too_small_to_be_cut_is_named(size):
  example = Example('some/a.png', 0, lambda: as_file(picture(*size)))
  with refused(f'cannot decode some/a.png: it is {size[0]} x {size[1]}$'):
    images.decode(example, 0, 32)
  assert images.decode(example, 32, 32)[0].shape == (32, 32, 3)


@pytest.mark.parametrize('mode', ['RGB', 'L', 'CMYK'])
def test_jpegs_of_every_mode(tmp_path, mode):
  path = tmp_path / 'n01440764' / 'a.JPEG'
  path.parent.mkdir()
  picture(60, 50, mode).save(path)
  (example,) = data.open_source(str(tmp_path), 'train', 1000).examples(0)
  pixels, digest = images.decode(example, 40, 32)
  with PIL.Image.open(path) as image:
    assert image.mode == mode
    assert digest == digest_of(image)
    np.testing.assert_array_equal(pixels, torchvision(image, 40, 32))
  grey = (pixels == pixels[..., :1]).all()
  assert grey == (mode == 'L')


@pytest.mark.parametrize(
  'content',
  [
    as_file(picture(60, 50), 'JPEG')[:1500],
    as_file(picture(60, 50), 'PNG')[:1500],
    b'no image',
    b'',
  ],
)
def test_a_damaged_image_is_named(tmp_path, content):
  path = tmp_path / 'n01440764' / 'a.JPEG'
  path.parent.mkdir()
  path.write_bytes(content)
  (example,) = data.open_source(str(tmp_path), 'train', 1000).examples(0)
  with refused(f'cannot decode {path}: '):
    images.decode(example, 40, 32)


def test_a_real_image_cut_in_half_is_named(shared, tmp_path):
  (whole, *_) = sorted((shared / 'imagenet' / 'val').glob('*/*.JPEG'))
  content = whole.read_bytes()
  path = tmp_path / 'n01440764' / 'half.JPEG'
  path.parent.mkdir()
  path.write_bytes(content[: len(content) // 2])
  source = data.open_source(str(tmp_path), 'train', 1000)
  with refused(f'cannot decode {path}: .*truncated'):
    images.samples(source, 1, resize=0, crop=224, cache=tmp_path / 'cache')
  assert list((tmp_path / 'cache').iterdir()) == []


def test_pixels_are_told_apart_by_all_of_them():
  pixels = np.asarray(picture(32, 32)).copy()
  digests = []
  for _ in range(2):
    found, digest = images.decode(Example('a', 0, lambda: pixels), 0, 32)
    np.testing.assert_array_equal(found, pixels)
    digests.append(digest)
    pixels[-1, -1, -1] ^= 1
  assert digests[0] != digests[1]
  assert [len(d) for d in digests] == [16, 16]


RAMP = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)


def decode(content, resize=0, crop=64):
  return images.decode(Example('a', 0, lambda: content), resize, crop)[0]


def pgm(values, largest):
  size = f'{values.shape[1]} {values.shape[0]}'
  header = f'P5 {size} {largest}\n'.encode()
  return header + values.astype('>u2').tobytes()


def tiff(values, *, photometric=1, bits=16, sample_format=1, order='<'):
  """A grey TIFF of one strip."""
  content = values.tobytes()
  height, width = values.shape
  tags = [(256, width), (257, height), (258, bits), (259, 1)]
  tags += [(262, photometric), (273, 8), (277, 1), (278, height)]
  tags += [(279, len(content)), (339, sample_format)]
  start = 8 + len(content)
  file = {'<': b'II', '>': b'MM'}[order] + struct.pack(order + 'HI', 42, start)
  file += content + struct.pack(order + 'H', len(tags))
  for tag, value in tags:
    kind = 'HHIHxx' if value < 65536 else 'HHII'
    file += struct.pack(order + kind, tag, 3 if value < 65536 else 4, 1, value)
  return file + bytes(4)


def twelve_bits(values):
  """Pairs of values of 12 bits in three bytes."""
  one, other = (values.astype(np.uint32).reshape(64, -1, 2)).transpose(2, 0, 1)
  three = [one >> 4, (one & 15) << 4 | other >> 8, other & 255]
  return np.stack(three, axis=-1).astype(np.uint8).reshape(64, -1)


DEEP = {
  'png': as_file(PIL.Image.fromarray(RAMP)),
  'tiff': as_file(PIL.Image.fromarray(RAMP), 'TIFF'),
  'tiff, little endian': tiff(RAMP.astype('<u2')),
  'tiff, big endian': tiff(RAMP.astype('>u2'), order='>'),
  'tiff, white is 0': tiff((65535 - RAMP).astype('<u2'), photometric=0),
  'pgm': pgm(RAMP, 65535),
  'pgm of ten bits': pgm(RAMP >> 6, 1023),
  'plain pgm': b'P2 64 64 65535 ' + ' '.join(map(str, RAMP.ravel())).encode(),
  'jpeg 2000': as_file(PIL.Image.fromarray(RAMP), 'JPEG2000'),
  'of eight': as_file(PIL.Image.fromarray((RAMP // 257).astype(np.uint8))),
}


@pytest.mark.parametrize('kind', list(DEEP))
def test_grey_images_of_more_than_eight_bits_are_scaled(kind):
  pixels = decode(DEEP[kind])
  expected = RAMP[..., None] / 257
  assert np.abs(pixels - expected).max() <= 1
  assert pixels.max() == 255
  assert pixels.min() == 0


def test_twelve_bits_are_scaled_by_their_own_range():
  packed = twelve_bits(RAMP >> 4)
  file = tiff(packed, bits=12).replace(
    struct.pack('<HHIH', 256, 3, 1, 96), struct.pack('<HHIH', 256, 3, 1, 64)
  )
  with PIL.Image.open(io.BytesIO(file)) as image:
    assert image.mode == 'I;16'
    assert np.asarray(image).max() == 4095
  assert np.abs(decode(file) - (RAMP >> 4)[..., None] / 4095 * 255).max() <= 0.5


@pytest.mark.parametrize('size', [(6, 5), (64, 48)])
def test_deep_images_are_scaled_before_they_are_cut(size):
  values = np.random.default_rng(0).integers(0, 65536, size[::-1], np.uint16)
  eight = PIL.Image.fromarray(((values + 128.0) // 257).astype(np.uint8))
  pixels = decode(as_file(PIL.Image.fromarray(values)), 40, 32)
  np.testing.assert_array_equal(pixels, torchvision(eight, 40, 32))


def test_deep_colours_keep_their_high_bytes():
  values = np.random.default_rng(0).integers(0, 65536, (8, 8, 3), np.uint16)
  content = b'P6 8 8 65535\n' + values.astype('>u2').tobytes()
  assert np.abs(decode(content, 0, 8) - values / 257).max() <= 1


@pytest.mark.parametrize(
  'content',
  [
    as_file(PIL.Image.fromarray((RAMP / 65535).astype(np.float32)), 'TIFF'),
    as_file(PIL.Image.fromarray((RAMP / 257).astype(np.float32)), 'TIFF'),
    as_file(PIL.Image.fromarray(RAMP.astype(np.int32)), 'TIFF'),
    tiff(RAMP.astype('<i2'), sample_format=2),
  ],
)
def test_values_of_an_unknown_range_are_refused(content):
  with refused('^cannot decode a: its pixels are .*convert it to 8 or 16 bits'):
    decode(content)


@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'RGBA', 'P'])
def test_what_is_transparent_is_dropped_as_torchvision_does(mode):
  image = picture(64, 64, 'RGB' if mode == '1' else 'RGBA').convert(mode)
  pixels = decode(
    as_file(image, transparency=3) if mode == 'P' else as_file(image)
  )
  np.testing.assert_array_equal(pixels, np.asarray(image.convert('RGB')))


def test_the_orientation_of_a_camera_is_not_applied():
  exif = PIL.Image.Exif()
  exif[0x0112] = 6
  image = picture(48, 64)
  content = as_file(image, 'PNG', exif=exif)
  np.testing.assert_array_equal(decode(content, 0, 48), np.asarray(image)[8:56])


@pytest.mark.parametrize('size', [(1, 60_000), (60_000, 2), (30, 65_000)])
def test_an_image_that_is_huge_when_scaled_is_refused(size):
  content = as_file(PIL.Image.new('RGB', size))
  width, height = size
  with refused(f'^cannot decode a: it is {width} x {height}, and would be '):
    decode(content, 256, 224)


def test_a_long_image_is_cut_from_its_middle():
  pixels = decode(as_file(picture(9, 3000)), 40, 32)
  np.testing.assert_array_equal(pixels, torchvision(picture(9, 3000), 40, 32))


def test_an_image_of_too_many_pixels_is_refused(monkeypatch):
  monkeypatch.setattr(PIL.Image, 'MAX_IMAGE_PIXELS', 1000)
  with refused('^cannot decode a: Image size .* exceeds limit'):
    decode(as_file(picture(60, 60)), 0, 32)


def test_postscript_is_not_run():
  with refused('^cannot decode a: it is PostScript'):
    decode(as_file(picture(40, 40), 'EPS'), 0, 32)


def planar(values, compression=1):
  """A TIFF whose channels [C, H, W] lie one after the other."""
  count, height, width = values.shape
  planes = [x.tobytes() for x in values]
  content = b''.join(planes)
  at = 8 + len(content)
  bits = struct.pack('<3H', *[8 * values.itemsize] * 3)
  starts = struct.pack('<3I', *[8 + i * len(planes[0]) for i in range(3)])
  lengths = struct.pack('<3I', *map(len, planes))
  head = b'II' + struct.pack('<HI', 42, at + len(bits + starts + lengths))
  offsets = at, at + len(bits), at + len(bits + starts)
  tags = [
    (256, 4, 1, width),
    (257, 4, 1, height),
    (258, 3, 3, offsets[0]),
    (259, 4, 1, compression),
    (262, 4, 1, 2),
    (273, 4, 3, offsets[1]),
    (277, 4, 1, count),
    (278, 4, 1, height),
    (279, 4, 3, offsets[2]),
    (284, 4, 1, 2),
  ]
  entries = b''.join(struct.pack('<HHII', *tag) for tag in tags)
  file = head + content + bits + starts + lengths
  return file + struct.pack('<H', len(tags)) + entries + bytes(4)


def test_channels_in_planes_are_read_in_8_bits_and_refused_in_16():
  values = np.stack([RAMP, RAMP[::-1], RAMP.T])
  eight = (values // 257).astype(np.uint8)
  np.testing.assert_array_equal(decode(planar(eight)), eight.transpose(1, 2, 0))
  with refused('more than 8 bits are in planes'):
    decode(planar(values.astype('<u2')))


def test_signed_numbers_of_8_bits_are_refused():
  file = tiff(
    (RAMP // 257).astype(np.int16).astype(np.int8), bits=8, sample_format=2
  )
  with refused('its pixels are signed numbers'):
    decode(file)
