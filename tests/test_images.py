"""Samples of images: how they are cut, drawn, decoded and kept."""

import collections
import contextlib
import hashlib
import io
import pathlib
import tarfile

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_jax import InputError, data, images, workloads
from nemo_jax.data import Example, Source


@contextlib.contextmanager
def refused(words):
  with pytest.raises(InputError, match=words) as caught:
    yield
  assert '\n' not in str(caught.value)


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
    np.testing.assert_array_equal(pixels, torchvision(image, 40, 32))
  grey = (pixels == pixels[..., :1]).all()
  assert grey == (mode == 'L')
  assert digest == hashlib.sha256(path.read_bytes()).digest()[:16]


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


def source_of(counts):
  """Of so many examples of each class, a, b and so on."""
  labels = np.repeat(np.arange(len(counts)), counts).tolist()

  def examples(seed):
    for i in np.random.default_rng(seed).permutation(len(labels)):
      yield Example(str(i), labels[i], bytes)

  names = {i: 'abcdefgh'[i] for i in range(len(counts))}
  return Source('letters', 'letters', len(labels), names, examples)


def drawn(source, even, others, seed=0):
  """The keys of each sample, and the labels of sample 0."""
  keys, labels = [[] for _ in range(1 + len(others))], []
  for number, example in images.draw(source, even, others, seed):
    keys[number].append(example.key)
    if number == 0:
      labels.append(example.label)
  return keys, labels


@st.composite
def requests(draw):
  """Counts of the classes, and of samples that there are enough images for."""
  counts = draw(st.lists(st.integers(1, 8), min_size=1, max_size=6))
  even = draw(st.integers(0, len(counts) * min(counts)))
  first = draw(st.integers(0, sum(counts) - even))
  second = draw(st.integers(0, sum(counts) - even - first))
  return counts, even, [first, second]


@given(requests(), st.integers(0, 2**32))
def test_samples_are_disjoint_and_the_first_is_even(request, seed):
  counts, even, others = request
  source = source_of(counts)
  keys, labels = drawn(source, even, others, seed)
  assert [len(sample) for sample in keys] == [even, *others]
  every = [key for sample in keys for key in sample]
  assert len(set(every)) == len(every)
  of_class = np.bincount(labels, minlength=len(counts))
  assert of_class.max() - of_class.min() <= 1
  assert (keys, labels) == drawn(source, even, others, seed)


@given(requests(), st.integers(0, 2**32))
def test_all_images_are_taken_when_all_are_asked_for(request, seed):
  counts, even, (first, _) = request
  rest = sum(counts) - even - first
  keys, _ = drawn(source_of(counts), even, [first, rest], seed)
  every = [int(key) for sample in keys for key in sample]
  assert sorted(every) == list(range(sum(counts)))


@given(
  st.lists(st.integers(1, 8), min_size=1, max_size=6), st.integers(0, 2**32)
)
def test_a_class_with_too_few_images_is_named(counts, seed):
  fewest = min(counts)
  names = [n for n, x in zip('abcdef', counts, strict=False) if x == fewest]
  words = f'^letters has {fewest} images of class [{"".join(names)}]; '
  with refused(f'{words}{fewest + 1} are asked for$'):
    drawn(source_of(counts), len(counts) * (fewest + 1), [1], seed)


def test_the_class_with_one_more_has_too_few_images():
  with refused('^letters has 2 images of class [abc]; 3 are asked for$'):
    drawn(source_of([2, 2, 2]), 7, [])


@pytest.mark.parametrize(
  ('even', 'others'), [(2, [5]), (6, [1]), (0, [7]), (0, [3, 4])]
)
def test_more_images_than_there_are(even, others):
  with refused('^letters has 6 images; 7 are asked for$'):
    drawn(source_of([3, 3]), even, others)


def test_the_seed_decides_which_images_and_which_classes():
  source = source_of([10] * 6)
  found = [drawn(source, 9, [20], seed) for seed in range(5)]
  assert len({frozenset(keys[0]) for keys, _ in found}) == 5
  assert len({frozenset(keys[1]) for keys, _ in found}) == 5
  twice = [np.bincount(labels, minlength=6) == 2 for _, labels in found]
  assert len({tuple(x) for x in twice}) > 1


def test_nothing_more_is_read_than_is_asked_for():
  read = collections.Counter()

  def examples(seed):
    for example in source_of([5, 5]).examples(seed):
      read['examples'] += 1
      yield example

  drawn(source_of([5, 5])._replace(examples=examples), 0, [4])
  assert read['examples'] == 4


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
  for number, example in images.draw(source, 6, (4, 1), 7):
    with PIL.Image.open(example.key) as image:
      pixels = torchvision(image, 36, 32)
    digest = hashlib.sha256(pathlib.Path(example.key).read_bytes()).digest()
    expected[number].append((pixels, example.label, digest[:16]))
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
      patch.setattr(images.shutil, 'rmtree', lambda *_, **__: None)
    with pytest.raises(kind, match='broken off'):
      cached()
  assert len(list((tmp_path / 'cache').iterdir())) == killed
  same(cached(), expected)


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


@pytest.mark.parametrize('name', ['images0.npy', 'labels1.npy', 'digests2.npy'])
@pytest.mark.parametrize(
  'damage',
  [
    lambda content: None,
    lambda content: b'',
    lambda content: b'no array' * 100,
    lambda content: content[:60],
    lambda content: content[:-1],
    lambda content: content.replace(b')', b' '),
  ],
)
def test_a_damaged_cache_is_named(cached, tmp_path, name, damage):
  cached()
  (folder,) = (tmp_path / 'cache').iterdir()
  content = damage((folder / name).read_bytes())
  (folder / name).unlink()
  if content is not None:
    (folder / name).write_bytes(content)
  with refused(f'{folder} is damaged .*; delete it to decode again'):
    cached()


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


@pytest.fixture
def cifar(shared, tmp_path):
  """Loads the workload, with a cache of its own."""
  pytest.importorskip('torch')

  def load(**sources):
    defaults = {
      'weights': str(shared / 'weights' / 'cifar10_resnet20.th'),
      'data': str(shared / 'cifar10' / 'train4000.npz'),
      'search_images': 103,
      'calibration_images': 20,
      'test_images': 50,
    }
    cache = tmp_path / 'cache'
    return workloads.load('cifar10_resnet20', cache, **defaults | sources)

  return load


@pytest.fixture
def pixels(shared):
  """All pixels and labels, [4000, 32, 32, 3] and [4000]."""
  with np.load(shared / 'cifar10' / 'train4000.npz') as stored:
    return stored['x'], stored['y']


def pieces(workload):
  return [
    {x.tobytes() for x in part.images}
    for part in (workload.search, workload.calibration, workload.test)
  ]


def test_one_source_is_divided(cifar, pixels):
  workload = cifar()
  parts = pieces(workload)
  assert [len(part) for part in parts] == [103, 20, 50]
  assert len(set().union(*parts)) == 173
  counts = np.bincount(workload.search.labels, minlength=10)
  assert sorted(counts) == [10] * 7 + [11] * 3
  labels = {x.tobytes(): y for x, y in zip(*pixels, strict=True)}
  for part in (workload.search, workload.calibration, workload.test):
    found = [labels[x.tobytes()] for x in part.images]
    np.testing.assert_array_equal(part.labels, found)


def test_all_that_is_left_of_one_source_is_the_test(cifar, pixels):
  parts = pieces(cifar(test_images=None))
  assert [len(part) for part in parts] == [103, 20, 4000 - 123]
  assert set().union(*parts) == {x.tobytes() for x in pixels[0]}


def test_another_seed_draws_other_images(cifar):
  one, same, other = (pieces(cifar(image_seed=x)) for x in (None, 0, 1))
  assert one == same
  # Of 4,000 images few are drawn twice.
  shared = [len(a & b) for a, b in zip(one, other, strict=True)]
  assert [len(part) for part in other] == [103, 20, 50]
  assert max(shared) < 20, shared


def test_the_defaults_of_the_recipe(cifar):
  parts = pieces(cifar(search_images=None, calibration_images=None))
  assert [len(part) for part in parts] == [1000, 256, 50]


@pytest.mark.parametrize(
  ('counts', 'words'),
  [
    ({'search_images': 3931}, '4000 images; 3931 .* 20 .* 50 to test'),
    ({'test_images': 3878}, '4000 images; 103 .* 20 .* 3878 to test'),
    ({'search_images': 3980, 'test_images': None}, '3980 .* 20 .* 1 to test'),
    ({'search_images': 3900}, 'of class [0-9]; 390 are asked for'),
  ],
)
def test_counts_that_do_not_fit_one_source(cifar, counts, words):
  with refused(words):
    cifar(**counts)


def test_validation_images_of_their_own(cifar, pixels, tmp_path):
  (x, y), paths = pixels, []
  for i, rows in enumerate((slice(0, 300), slice(300, 400), slice(299, 400))):
    paths.append(str(tmp_path / f'{i}.npz'))
    np.savez(paths[-1], x=x[rows], y=y[rows])
  both = {'data': paths[0], 'search_images': 100, 'calibration_images': 200}
  parts = pieces(cifar(**both, validation=paths[1], test_images=None))
  assert parts[0] | parts[1] == {image.tobytes() for image in x[:300]}
  assert parts[2] == {image.tobytes() for image in x[300:400]}
  few = cifar(**both, validation=paths[1], test_images=11).test
  assert sorted(np.bincount(few.labels, minlength=10)) == [1] * 9 + [2]
  with refused('^1 of the validation images are among those of the search'):
    cifar(**both, validation=paths[2], test_images=None)


def test_the_share_of_the_image_that_is_seen_stays(cifar, pixels, tmp_path):
  x, y = pixels
  for name, rows in (('a', slice(0, 300)), ('b', slice(300, 320))):
    np.savez(tmp_path / f'{name}.npz', x=x[rows], y=y[rows])
  sources = {
    'data': str(tmp_path / 'a.npz'),
    'validation': str(tmp_path / 'b.npz'),
    'test_images': None,
  }

  def expected(rows, resize, crop):
    scaled = [
      torchvision(PIL.Image.fromarray(image), resize, crop) for image in x[rows]
    ]
    return {image.tobytes() for image in scaled}

  search, _, test = pieces(cifar(**sources, image_size=40))
  assert search < expected(slice(0, 300), 40, 40)
  assert test == expected(slice(300, 320), 40, 40)
  search, _, test = pieces(cifar(**sources, resize=34, validation_resize=36))
  assert search < expected(slice(0, 300), 34, 32)
  assert test == expected(slice(300, 320), 36, 32)


def test_imagenet_from_its_tar_and_from_folders(
  shared, imagenet_tfds, tmp_path
):
  pytest.importorskip('torch')
  folder = shared / 'imagenet' / 'val'
  workload = workloads.load(
    'mobilenet_v2',
    tmp_path,
    weights=str(shared / 'weights' / 'mobilenet_v2.pth'),
    data=str(imagenet_tfds),
    validation=str(folder),
    image_size=128,
    validation_resize=0,
    search_images=30,
    calibration_images=5,
    test_images=20,
  )
  assert workload.calibration.images.shape == (5, 128, 128, 3)
  assert len(set(workload.search.labels.tolist())) == 30
  source = data.open_source(str(imagenet_tfds), 'train', 1000)
  # Five classes in eight are seen of 256 pixels: 146 of 128.
  known = {
    e.label: torchvision(PIL.Image.open(io.BytesIO(e.content())), 146, 128)
    for e in source.examples(0)
    if e.label in workload.search.labels
  }
  for image, label in zip(*workload.search, strict=True):
    np.testing.assert_array_equal(image, known[int(label)])
  wnids = list(data.imagenet_classes())
  for image, label in zip(*workload.test, strict=True):
    centres = [
      np.asarray(PIL.Image.open(file).convert('RGB'))[49:177, 49:177]
      for file in (folder / wnids[label]).iterdir()
    ]
    assert any(np.array_equal(image, centre) for centre in centres)


@pytest.mark.parametrize(
  ('missing', 'words'),
  [
    ('data', 'cifar10_resnet20 needs images: name .* with --data'),
    ('weights', 'has no official weights; name a checkpoint with --weights'),
  ],
)
def test_what_has_to_be_named(cifar, missing, words):
  with refused(words):
    cifar(**{missing: None})
