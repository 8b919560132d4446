"""Class folders: which files are read, and which label each has."""

import os
import pathlib
import time
import warnings

import PIL.Image
import pytest

from nemo_jax import data
from nemo_jax.data import images
from tests.pictures import (
  TEN,
  WNIDS,
  class_folders,
  jpeg,
  noise,
  read,
  refused,
)


def classes_of(examples):
  """The label of each class folder."""
  return {pathlib.Path(e.key).parent.name: e.label for e in examples}


def test_wordnet_ids_have_their_place_among_all(tmp_path):
  class_folders(tmp_path, [*reversed(WNIDS)])
  assert classes_of(read(tmp_path)) == WNIDS
  source = data.open_source(str(tmp_path), 'train', 1000)
  assert source.classes == {label: name for name, label in WNIDS.items()}
  assert source.size == 3


@pytest.mark.parametrize('count', [10, 1000])
def test_as_many_folders_as_classes_count_in_order(tmp_path, count):
  names = [f'kind{i:04}' for i in range(count)]
  class_folders(tmp_path, reversed(names))
  labels = classes_of(read(tmp_path, num_classes=count))
  assert labels == {name: i for i, name in enumerate(names)}


def test_every_image_of_the_validation_folder_has_its_class(shared):
  folder = shared / 'imagenet' / 'val'
  examples = read(folder, 'validation')
  assert {e.key for e in examples} == {str(f) for f in folder.glob('*/*.JPEG')}
  for example in examples:
    wnid = pathlib.Path(example.key).parent.name
    assert example.label == data.imagenet_classes()[wnid]


def test_what_is_hidden_is_skipped(tmp_path):
  class_folders(tmp_path)
  (tmp_path / '.git').mkdir()
  (tmp_path / 'README').write_text('of the images')
  (tmp_path / 'n01440764' / '.thumbnails').mkdir()
  for name in ('.DS_Store', '._0.JPEG', '.thumbnails/0.JPEG'):
    (tmp_path / 'n01440764' / name).write_text('no image')
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    assert len(read(tmp_path)) == 3


def test_files_that_are_left_out_are_counted(tmp_path):
  class_folders(tmp_path)
  (tmp_path / 'n01440764' / 'more').mkdir()
  for name in ('n01440764/list.txt', 'n01440764/more/a.gif', 'beside.png'):
    (tmp_path / name).write_text('of another kind')
  os.mkfifo(tmp_path / 'n01440764' / 'pipe.png')
  words = f'^left out 4 files in {tmp_path} .* such as beside.png; images are'
  with pytest.warns(UserWarning, match=words) as caught:
    assert len(read(tmp_path)) == 3
  assert len(caught) == 1
  assert '\n' not in str(caught[0].message)


@pytest.mark.parametrize('suffix', data.folders.SUFFIXES)
def test_the_files_that_torchvision_reads(tmp_path, suffix):
  class_folders(tmp_path)
  for name in (f'0{suffix}', f'1{suffix.upper()}', f'deep/er/2{suffix}'):
    file = tmp_path / 'n01440764' / name
    file.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(noise(1)).convert('L').save(file)
  found = read(tmp_path)
  assert len(found) == 6
  for example in found:
    pixels, _ = images.decode(example, 0, 32)
    assert pixels.shape == (32, 32, 3)
    wnid = pathlib.Path(example.key).relative_to(tmp_path).parts[0]
    assert example.label == WNIDS[wnid]


def test_links_are_followed_once(tmp_path):
  kept = class_folders(tmp_path / 'elsewhere', ['kept']) / 'kept'
  where = class_folders(tmp_path / 'data', TEN)
  (where / 'a' / 'kept').symlink_to(kept)
  (kept / 'back').symlink_to(where / 'a')
  (where / 'b' / 'linked.jpg').symlink_to(kept / '0.JPEG')
  assert len(read(where, num_classes=10)) == 12


def test_a_link_that_leads_nowhere_is_named(tmp_path):
  where = class_folders(tmp_path)
  (where / 'n01440764' / 'a.jpg').symlink_to(tmp_path / 'nothing')
  with refused(f'cannot use {where}/n01440764/a.jpg: No such file'):
    data.open_source(str(where), 'train', 1000)


@pytest.mark.parametrize(
  ('names', 'order'),
  [
    (('2', '10', '1', '100'), ('1', '2', '10', '100')),
    (('2', '010', '1', '003'), ('1', '2', '003', '010')),
    (('2', '10', '1', 'a'), ('1', '10', '2', 'a')),
    (('c2', 'c10', 'c1'), ('c1', 'c10', 'c2')),
    (('-2', '-10', '3'), ('-10', '-2', '3')),
    (('2.5', '10', '3'), ('2.5', '3', '10')),
    (('2 ', '10 ', '1 '), ('1 ', '2 ', '10 ')),
    (('+2', '+10', '+1'), ('+1', '+2', '+10')),
    (('1e1', '9', '2'), ('2', '9', '1e1')),
    (('1', '10', '2', 'nan'), ('1', '10', '2', 'nan')),
    (('1_0', '2'), ('1_0', '2')),
  ],
)
def test_folders_named_by_numbers_are_in_their_order(tmp_path, names, order):
  class_folders(tmp_path, names)
  source = data.open_source(str(tmp_path), 'train', len(names))
  assert source.classes == dict(enumerate(order))
  examples = source.examples(0)
  assert classes_of(examples) == {name: i for i, name in enumerate(order)}


def test_the_folders_of_imagenet_v2_are_in_the_order_of_the_labels(tmp_path):
  class_folders(tmp_path, [str(i) for i in range(1000)])
  found = classes_of(read(tmp_path))
  assert found == {str(i): i for i in range(1000)}


def test_a_class_that_is_no_wordnet_id_among_others_is_refused(tmp_path):
  ids = sorted(data.imagenet_classes())
  class_folders(tmp_path, [*ids[:990], *ids[991:], 'unlabelled'])
  with refused("has the class 'unlabelled', which is no WordNet id"):
    data.open_source(str(tmp_path), 'train', 1000)


@pytest.mark.parametrize(
  ('one', 'other', 'words'),
  [
    (('cat', 'dog'), ('dog', 'wolf'), "class 0 is 'cat' in .* and 'dog' in"),
    (('0', '1', '2'), ('1', '2', '3'), "class 0 is '0' in .* and '1' in"),
    (('1', '2'), ('1', '3'), "class 1 is '2' in .* and '3' in"),
    (('cat', 'dog'), ('0', '1'), None),
    (('cat', 'dog'), ('cat', 'dog'), None),
  ],
)
def test_two_sources_need_the_same_classes(tmp_path, one, other, words):
  sources = []
  for name, classes in (('train', one), ('valid', other)):
    class_folders(tmp_path / name, classes)
    role = 'train' if name == 'train' else 'validation'
    sources.append(data.open_source(str(tmp_path), role, len(classes)))
  assert sources[0].identity != sources[1].identity
  if words is None:
    data.check_same_classes(*sources)
    return
  with refused(words):
    data.check_same_classes(*sources)


@pytest.mark.parametrize('names', [('1', '01'), ('7', '\u0667'), ('1', '1.0')])
def test_two_names_of_one_number_are_refused(tmp_path, names):
  class_folders(tmp_path, names)
  with refused(f'{tmp_path} has the classes .*, which are one number'):
    data.open_source(str(tmp_path), 'train', 2)


@pytest.mark.parametrize('deep', [False, True])
def test_a_folder_that_was_mended_in_place_is_another(tmp_path, deep):
  class_folders(tmp_path)
  file = tmp_path / 'n01440764' / ('more/0.JPEG' if deep else '0.JPEG')
  file.parent.mkdir(exist_ok=True)
  file.write_bytes(jpeg(0))
  identity = lambda: data.open_source(str(tmp_path), 'train', 1000).identity
  before, times = identity(), file.stat()
  assert identity() == before
  time.sleep(0.05)  # the clock of the file system
  file.write_bytes(jpeg(1))
  assert file.stat().st_size == times.st_size
  os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
  assert identity() != before


@pytest.mark.parametrize(
  ('names', 'num_classes', 'words'),
  [
    ((*WNIDS, 'tench'), 1000, "'tench', which is no WordNet id"),
    (('n00000000',), 1000, "'n00000000', which is no WordNet id"),
    (TEN[:9], 10, 'has 9 classes; the network has 10'),
    (tuple(WNIDS), 10, 'has 3 classes; the network has 10'),
    (('.hidden',), 10, 'has 0 classes; the network has 10'),
    (('.hidden',), 1000, 'folder'),
    ((), 10, 'neither a TFDS data set nor a folder for each class'),
  ],
)
def test_folders_that_are_not_the_classes(tmp_path, names, num_classes, words):
  class_folders(tmp_path, names)
  with refused(f'{tmp_path}.*{words}'):
    data.open_source(str(tmp_path), 'train', num_classes)


def test_an_empty_class_is_named(tmp_path):
  class_folders(tmp_path)
  (tmp_path / 'n01443537' / '1.JPEG').rename(tmp_path / 'n01443537' / '1.txt')
  with refused(f'{tmp_path}/n01443537 holds no image; known are .jpg'):
    data.open_source(str(tmp_path), 'train', 1000)
