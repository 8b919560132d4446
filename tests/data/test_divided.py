"""Images of the pretrained workloads: from one source or from two."""

import io

import numpy as np
import PIL.Image
import pytest

from nemo_jax import data, workloads
from tests.pictures import refused, torchvision


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


def test_copies_in_one_source_are_in_one_part(cifar, pixels, tmp_path):
  x, y = pixels[0][:200], pixels[1][:200]
  path = str(tmp_path / 'copies.npz')
  np.savez(path, x=np.concatenate([x, x, x]), y=np.concatenate([y, y, y]))
  counts = {'search_images': 50, 'calibration_images': 20}
  with pytest.warns(UserWarning, match=f'^{path}: left out [0-9]+ images'):
    workload = cifar(data=path, **counts, test_images=None)
  parts = pieces(workload)
  assert [len(workload.search.labels), len(workload.calibration.labels)] == [
    50,
    20,
  ]
  assert set().union(*parts) <= {image.tobytes() for image in x}
  assert sum(map(len, parts)) == len(set().union(*parts))
  with refused('has 600 images, 200 of them distinct; 600 are asked for'):
    cifar(data=path, **counts, test_images=530)


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
