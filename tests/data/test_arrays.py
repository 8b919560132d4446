"""Images and labels in an .npz."""

import io
import os
import zipfile

import numpy as np
import pytest

from nemo_jax import data
from tests.pictures import TEN, arrays, class_folders, refused


@pytest.mark.parametrize('shape', [(30,), (30, 1)])
def test_arrays_keep_pixels_and_labels_together(tmp_path, shape):
  stored = arrays()
  path = tmp_path / 'a.npz'
  np.savez(path, x=stored['x'], y=stored['y'].reshape(shape))
  source = data.open_source(str(path), 'train', 10)
  assert source.size == 30
  assert source.classes == {i: str(i) for i in range(10)}
  found = {e.content().tobytes(): e.label for e in source.examples(0)}
  pairs = zip(stored['x'], stored['y'], strict=True)
  assert found == {x.tobytes(): y for x, y in pairs}


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    ({'x': np.zeros((30, 8, 9, 3), np.float32)}, r'x is float32\[30, 8, 9, 3]'),
    ({'x': np.zeros((30, 9, 3), np.uint8)}, r'x is uint8\[30, 9, 3]'),
    ({'x': np.zeros((30, 8, 9, 4), np.uint8)}, r'x is uint8\[30, 8, 9, 4]'),
    ({'y': np.zeros(30)}, r'y is float64\[30]'),
    ({'y': np.zeros(29, int)}, r'y is int64\[29]; there are 30'),
    ({'y': np.arange(30)}, 'a.npz.* 29.* 10'),
    ({'y': np.arange(30) % 10 - 1}, 'a.npz.* -1.* 10'),
    ({'x': np.zeros((0, 8, 9, 3), np.uint8), 'y': np.zeros(0, int)}, 'a.npz'),
    ({'y': np.arange(30).reshape(2, 15)}, r'y is int64\[2, 15]'),
    ({'x': None}, 'holds no arrays x and y: it has no x'),
    ({'y': None}, 'holds no arrays x and y: it has no y'),
  ],
)
def test_arrays_that_are_no_labelled_images(tmp_path, changes, words):
  path = tmp_path / 'a.npz'
  np.savez(path, **arrays(**changes))
  with refused(words):
    data.open_source(str(path), 'train', 10)


@pytest.mark.parametrize(
  'damage',
  [
    lambda content: b'',
    lambda content: b'no archive',
    lambda content: content[: len(content) // 2],
    lambda content: content[:3000] + b'flipped' + content[3007:],
    lambda content: content[:26] + bytes(4) + content[30:],
    lambda content: content[:29] + b'\xff' + content[30:],
  ],
)
def test_damaged_arrays_are_named(tmp_path, damage):
  path = tmp_path / 'a.npz'
  np.savez(path, **arrays())
  path.write_bytes(damage(path.read_bytes()))
  with refused(f'{path} holds no arrays x and y: '):
    data.open_source(str(path), 'train', 10)


@pytest.mark.parametrize('name', ['x', 'y'])
def test_arrays_never_run_what_they_hold(tmp_path, name):
  class Trap:
    def __reduce__(self):
      return os.mkdir, (str(tmp_path / 'sprung'),)

  path = tmp_path / 'a.npz'
  np.savez(path, **arrays(**{name: np.asarray([Trap()], object)}))
  with refused('holds objects, not numbers'):
    data.open_source(str(path), 'train', 10)
  assert not (tmp_path / 'sprung').exists()
  with np.load(path, allow_pickle=True) as stored:
    assert stored[name].shape == (1,)
  assert (tmp_path / 'sprung').exists()


@pytest.mark.parametrize('layout', ['folders', 'train folder', 'arrays'])
def test_the_only_images_serve_both_roles_as_the_same(tmp_path, layout):
  if layout == 'arrays':
    where = tmp_path / 'a.npz'
    np.savez(where, **arrays())
  else:
    where = tmp_path
    class_folders(where / 'train' if layout == 'train folder' else where, TEN)
  one, other = (
    data.open_source(str(where), role, 10) for role in ('train', 'validation')
  )
  assert one.identity == other.identity


def test_other_arrays_in_the_file_are_not_read(tmp_path):
  names = np.asarray(['ship', None], object)
  np.savez(tmp_path / 'a.npz', names=names, **arrays())
  assert data.open_source(str(tmp_path / 'a.npz'), 'train', 10).size == 30


def huge(content):
  """The content with a header that claims a petabyte."""
  file = io.BytesIO()
  with (
    zipfile.ZipFile(io.BytesIO(content)) as old,
    zipfile.ZipFile(file, 'w') as new,
  ):
    for name in old.namelist():
      member = old.read(name)
      if name == 'x.npy':
        member = member.replace(b'(30, 8, 9, 3)', b'(9999999999999, 8, 9, 3)')
        member = member.replace(b' ' * 10, b'', 1)
      new.writestr(name, member)
  return file.getvalue()


@pytest.mark.parametrize('kind', ['npy', 'petabyte'])
def test_a_file_that_is_something_else_is_named(tmp_path, kind):
  path = tmp_path / 'a.npz'
  if kind == 'npy':
    with open(path, 'wb') as file:
      np.save(file, arrays()['x'])
  else:
    np.savez(path, **arrays())
    path.write_bytes(huge(path.read_bytes()))
  words = {'npy': 'not a zip file', 'petabyte': 'not as long as its header'}
  with refused(f'{path} holds no arrays x and y: .*{words[kind]}'):
    data.open_source(str(path), 'train', 10)


def test_arrays_that_were_mended_in_place_are_others(tmp_path):
  path = tmp_path / 'a.npz'
  identities, stored = [], arrays()
  for change in range(3):
    stored['y' if change == 1 else 'x'].flat[0] = 1 + change
    np.savez(path, **stored)
    os.utime(path, (0, 0))
    identities.append(data.open_source(str(path), 'train', 10).identity)
  assert len(set(identities)) == 3
