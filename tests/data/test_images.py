"""Samples that are decoded once and kept."""

import contextlib
import re
import resource
import time

import numpy as np
import PIL.Image
import pytest

from nemo_jax import InputError, data
from nemo_jax.core import files
from nemo_jax.data import images
from tests.pictures import digest_of, picture, refused, torchvision


@pytest.fixture
def folder(tmp_path):
  """Class folders of 12 small images."""
  path = tmp_path / 'data'
  for i in range(12):
    file = path / ('n01440764', 'n01443537', 'n02119789')[i % 3] / f'{i}.png'
    file.parent.mkdir(parents=True, exist_ok=True)
    picture(44, 40, seed=i).save(file)
  return path


@pytest.fixture
def cached(folder, tmp_path):
  """`samples` of the folder, with a cache of its own."""

  def make(even=6, others=(4, 1), **options):
    source = data.open_source(str(folder), 'train', 1000)
    options = {'resize': 36, 'crop': 32, 'cache': tmp_path / 'cache'} | options
    return images.samples(source, even, others, **options)

  return make


@pytest.fixture
def decoded(monkeypatch):
  """The keys of what is decoded from now on."""
  keys, decode = [], images.decode

  def record(example, *arguments):
    keys.append(example.key)
    return decode(example, *arguments)

  monkeypatch.setattr(images, 'decode', record)
  return keys


def same(one, other):
  assert len(one) == len(other)
  for a, b in zip(one, other, strict=True):
    np.testing.assert_array_equal(a.images.images, b.images.images)
    np.testing.assert_array_equal(a.images.labels, b.images.labels)
    np.testing.assert_array_equal(a.digests, b.digests)


def test_samples_hold_what_draw_says(folder, cached):
  source = data.open_source(str(folder), 'train', 1000)
  expected = [[] for _ in range(3)]
  look = lambda example: (None, example.key)
  for number, example, _, _ in images.draw(source, 6, (4, 1), 7, look):
    with PIL.Image.open(example.key) as image:
      pixels, digest = torchvision(image, 36, 32), digest_of(image)
    expected[number].append((pixels, example.label, digest))
  samples = cached(seed=7)
  assert len(samples) == 3
  for sample, rows in zip(samples, expected, strict=True):
    pixels, labels, digests = zip(*rows, strict=True)
    np.testing.assert_array_equal(sample.images.images, pixels)
    np.testing.assert_array_equal(sample.images.labels, labels)
    assert [d.tobytes() for d in sample.digests] == list(digests)


def test_samples_are_mapped_and_cannot_be_changed(cached):
  for sample, count in zip(cached(), (6, 4, 1), strict=True):
    for array, dtype, shape in (
      (sample.images.images, np.uint8, (count, 32, 32, 3)),
      (sample.images.labels, np.int32, (count,)),
      (sample.digests, np.uint8, (count, 16)),
    ):
      assert isinstance(array, np.memmap)
      assert array.dtype == dtype
      assert array.shape == shape
      assert not array.flags.writeable


def test_a_sample_may_be_empty(cached):
  none, every = cached(0, [12])
  assert none.images.images.shape == (0, 32, 32, 3)
  assert len({d.tobytes() for d in every.digests}) == 12


def test_nothing_is_decoded_twice(cached, decoded):
  first = cached()
  assert len(decoded) == 11
  same(first, cached())
  assert len(decoded) == 11


@pytest.mark.parametrize(
  ('change', 'count'),
  [
    ({'crop': 30}, 11),
    ({'resize': 34}, 11),
    ({'resize': 0}, 11),
    ({'seed': 1}, 11),
    ({'even': 3}, 8),
    ({'others': (1, 4)}, 11),
    ({'others': (4,)}, 10),
  ],
)
def test_another_request_is_decoded_anew(cached, decoded, change, count):
  cached()
  decoded.clear()
  samples = cached(**change)
  assert len(decoded) == count
  assert sum(len(s.digests) for s in samples) == count


def test_a_changed_folder_is_decoded_anew(folder, cached, decoded):
  cached(0, [12])
  added = folder / 'n02119789' / '99.png'
  picture(44, 40, seed=99).save(added)
  decoded.clear()
  _, sample = cached(0, [13])
  assert len(sample.digests) == 13
  decoded.clear()
  added.unlink()
  picture(44, 40, seed=100).save(folder / 'n02119789' / '98.png')
  cached(0, [13])
  assert str(folder / 'n02119789' / '98.png') in decoded
  assert str(added) not in decoded


def test_an_image_that_was_mended_in_place_is_decoded_anew(folder, cached):
  before = cached(0, [12])
  time.sleep(0.05)  # the clock of the file system
  picture(44, 40, seed=98).save(folder / 'n01440764' / '0.png')
  after = cached(0, [12])
  changed = (after[1].images.images != before[1].images.images).any((1, 2, 3))
  assert changed.sum() == 1
  changed = (after[1].digests != before[1].digests).any(1)
  assert changed.sum() == 1


@pytest.mark.parametrize('kind', [InputError, KeyboardInterrupt, OSError])
@pytest.mark.parametrize('killed', [False, True])
def test_what_was_broken_off_is_not_used(
  cached, tmp_path, monkeypatch, kind, killed
):
  expected = cached(cache=tmp_path / 'other')
  decode, left = images.decode, iter(range(7))

  def fail(*arguments):
    if next(left, None) is None:
      raise kind('broken off')
    return decode(*arguments)

  with monkeypatch.context() as patch:
    patch.setattr(images, 'decode', fail)
    if killed:  # a process that is killed does not tidy up
      patch.setattr(files, 'delete', lambda _: None)
    shown = InputError if kind is OSError else kind
    with pytest.raises(shown, match='broken off'):
      cached()
  assert len(list((tmp_path / 'cache').iterdir())) == killed
  same(cached(), expected)


@contextlib.contextmanager
def files_no_larger_than(count):
  """Writing more bytes to a file fails, as on a full disk."""
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (count, limits[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize('size', [100, 5_000, 12_000])
def test_a_full_disk_ends_in_a_line_and_leaves_nothing(cached, tmp_path, size):
  folder = tmp_path / 'cache'
  with files_no_larger_than(size), refused(f'^cannot use {folder}: File too'):
    cached()
  assert list(folder.iterdir()) == []
  cached()


def test_a_cache_that_cannot_be_a_folder_is_named(cached, tmp_path):
  (tmp_path / 'file').write_text('')
  with refused(f'^cannot use {tmp_path}/file'):
    cached(cache=tmp_path / 'file')


def test_two_processes_may_decode_the_same(cached, tmp_path, monkeypatch):
  decode, first = images.decode, iter([True])

  def interrupted(*arguments):
    if next(first, False):
      cached()  # what the other one does in the meantime
    return decode(*arguments)

  expected = cached(cache=tmp_path / 'other')
  monkeypatch.setattr(images, 'decode', interrupted)
  same(cached(), expected)
  assert len(list((tmp_path / 'cache').iterdir())) == 1


NAMES = ['images0.npy', 'labels1.npy', 'digests2.npy', 'manifest.json']


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize(
  'damage',
  [
    lambda content: None,
    lambda content: b'',
    lambda content: b'no array' * 100,
    lambda content: content[:60],
    lambda content: content[:-1],
    lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
  ],
)
def test_a_damaged_cache_is_decoded_again(
  cached, tmp_path, decoded, name, damage
):
  expected = cached(cache=tmp_path / 'other')
  cached()
  decoded.clear()
  (folder,) = (tmp_path / 'cache').iterdir()
  content = damage((folder / name).read_bytes())
  (folder / name).unlink()
  if content is not None:
    (folder / name).write_bytes(content)
  words = f'^{folder}.* is damaged: .*; it is decoded again$'
  with pytest.warns(UserWarning, match=words) as caught:
    same(cached(), expected)
  assert len(caught) == 1
  assert len(decoded) == 11
  same(cached(), expected)
  assert len(decoded) == 11


def test_the_images_of_another_request_are_not_taken(cached, tmp_path):
  expected = cached(seed=1)
  cached(seed=2)
  one, other = (tmp_path / 'cache').iterdir()
  one.rename(tmp_path / 'aside')
  other.rename(one)
  (tmp_path / 'aside').rename(other)
  with pytest.warns(UserWarning, match='its manifest differs'):
    same(cached(seed=1), expected)


@pytest.mark.parametrize('stem', ['images1', 'labels1', 'digests0', 'manifest'])
def test_a_changed_byte_changes_no_image(tmp_path, stem):
  pixels = np.stack([np.asarray(picture(8, 8, seed=i)) for i in range(4)])
  np.savez(tmp_path / 'a.npz', x=pixels, y=[0, 1, 0, 1])
  source = data.open_source(str(tmp_path / 'a.npz'), 'train', 2)
  options = {'resize': 8, 'crop': 8, 'cache': tmp_path / 'cache'}
  expected = images.samples(source, 2, [None], **options)
  (folder,) = (tmp_path / 'cache').iterdir()
  generator = np.random.default_rng(0)
  for _ in range(15):
    (file,) = folder.glob(f'{stem}.*')
    content = bytearray(file.read_bytes())
    content[generator.integers(len(content))] ^= generator.integers(1, 256)
    # Not in place: what is expected is mapped.
    file.unlink()
    file.write_bytes(content)
    with pytest.warns(UserWarning, match='is damaged'):
      same(images.samples(source, 2, [None], **options), expected)


def test_copies_are_told_whenever_the_samples_are_read(tmp_path):
  pixels = np.stack([np.asarray(picture(8, 8, seed=i)) for i in (0, 1, 0, 0)])
  np.savez(tmp_path / 'a.npz', x=pixels, y=[0, 0, 1, 0])
  source = data.open_source(str(tmp_path / 'a.npz'), 'train', 2)
  for _ in range(2):
    with pytest.warns(UserWarning, match='copies') as caught:
      even, rest = images.samples(
        source, 0, [1, None], resize=0, crop=8, cache=tmp_path / 'cache'
      )[1:]
    lines = sorted(str(x.message) for x in caught)
    assert len(lines) == 2
    assert re.search(r'left out [12] images that are copies', lines[1])
    assert re.search(r'copies of one with another label, such as', lines[0])
    images.check_disjoint(even, rest)
    assert len(rest.digests) >= 1


def test_an_image_in_another_format_is_a_copy(tmp_path):
  for i, kind in enumerate(('png', 'bmp', 'tiff', 'ppm', 'png')):
    (tmp_path / 'data' / str(i % 2)).mkdir(parents=True, exist_ok=True)
    file = tmp_path / 'data' / str(i % 2) / f'{i}.{kind}'
    picture(9, 8, seed=i // 4).save(file)
  source = data.open_source(str(tmp_path / 'data'), 'train', 2)
  with refused('has 5 images, 2 of them distinct; 3 are asked for'):
    images.samples(source, 0, [1, 1, 1], resize=0, crop=8, cache=tmp_path / 'c')


def test_an_image_larger_than_its_scale_is_refused(cached):
  with refused('resize is 31; it must be 0, or 32 and more'):
    cached(resize=31)


def test_the_same_image_in_two_samples_is_refused(cached):
  one, other, last = cached()
  images.check_disjoint(one, other)
  images.check_disjoint(other, last)
  two = one._replace(
    digests=np.concatenate([one.digests[2:4], other.digests, one.digests[2:3]])
  )
  with refused('^2 of the validation images are among those of the search'):
    images.check_disjoint(one, two)
