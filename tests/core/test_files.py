"""Files: whole or absent, and never silently other than what was written."""

import contextlib
import json
import os
import pathlib
import tempfile

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from nemo_jax import InputError
from nemo_jax.core import files

ARRAYS = {'codes': np.arange(40, dtype=np.int8), 'scale': np.float32(0.25)}


def same(found) -> bool:
  return set(found) == set(ARRAYS) and all(
    found[name].dtype == ARRAYS[name].dtype
    and np.array_equal(found[name], ARRAYS[name])
    for name in ARRAYS
  )


@pytest.fixture(scope='module')
def content(tmp_path_factory) -> bytes:
  path = tmp_path_factory.mktemp('arrays') / 'a.npz'
  files.write_arrays(path, ARRAYS)
  assert same(files.read_arrays(path))
  return path.read_bytes()


@hypothesis.settings(max_examples=300)
@hypothesis.given(data=st.data())
def test_a_changed_byte_is_noticed_or_changes_nothing(content, data):
  place = data.draw(st.integers(0, len(content) - 1))
  value = data.draw(st.integers(0, 255))
  hurt = bytearray(content)
  hurt[place] = value
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / 'a.npz'
    path.write_bytes(hurt)
    found = None
    with contextlib.suppress(files.DamagedError):
      found = files.read_arrays(path)
  assert found is None or same(found)


def test_a_damaged_cache_is_made_again(tmp_path):
  path = tmp_path / 'a.npz'
  assert same(files.cached(path, lambda: ARRAYS))
  assert same(files.cached(path, pytest.fail))
  path.write_bytes(path.read_bytes()[:-9])
  with pytest.warns(UserWarning, match='a.npz is damaged.*made again'):
    assert same(files.cached(path, lambda: ARRAYS))
  assert same(files.cached(path, pytest.fail))


def test_a_cache_that_does_not_fit_is_made_again(tmp_path):
  path = tmp_path / 'a.npz'
  files.write_arrays(path, {'codes': np.zeros(3)})

  def parse(arrays):
    if arrays['codes'].dtype != np.int8:
      raise InputError('codes are no int8')
    return arrays['codes'].sum()

  with pytest.warns(UserWarning, match='a.npz: codes are no int8; .*again'):
    assert files.cached(path, lambda: ARRAYS, parse) == 780
  assert files.cached(path, pytest.fail, parse) == 780


def test_a_cache_that_takes_no_file_is_named_before_the_work(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(InputError, match='cannot use .*file'):
    files.cached(tmp_path / 'file' / 'a.npz', pytest.fail)


def test_work_that_fails_leaves_nothing_in_the_cache(tmp_path):
  def fail():
    raise KeyError

  with pytest.raises(KeyError):
    files.cached(tmp_path / 'a.npz', fail)
  assert not list(tmp_path.iterdir())


def test_a_header_that_claims_a_petabyte_is_refused(tmp_path):
  path = tmp_path / 'a.npz'
  files.write_arrays(path, {'x': np.zeros((3, 100), np.uint8)})
  content = path.read_bytes()
  assert content.count(b'(3, 100)') == 1
  # The checksum of the zip is not looked at before the header is.
  path.write_bytes(content.replace(b'(3, 100)', b'(9**9, )'))
  with pytest.raises(files.DamagedError):
    files.read_npz(path)
  path.write_bytes(content.replace(b'(3, 100), }', b'(9000000000,'))
  with pytest.raises(files.DamagedError):
    files.read_npz(path)


def test_objects_are_not_read(tmp_path):
  np.savez(tmp_path / 'a.npz', x=np.asarray([{}], object))
  with pytest.raises(files.DamagedError, match='holds objects'):
    files.read_npz(tmp_path / 'a.npz')


def test_an_array_by_the_name_of_an_archive_is_refused(tmp_path):
  with open(tmp_path / 'a.npz', 'wb') as file:
    np.save(file, np.zeros(3))
  with pytest.raises(files.DamagedError, match='a.npz is damaged'):
    files.read_npz(tmp_path / 'a.npz')


def test_what_fails_leaves_the_old_file_and_no_draft(tmp_path):
  files.write_text(tmp_path / 'a.txt', 'old')

  def fail():
    with files.draft(tmp_path / 'a.txt') as made:
      made.write_text('half')
      raise KeyError

  with pytest.raises(KeyError):
    fail()
  assert [p.name for p in tmp_path.iterdir()] == ['a.txt']
  assert (tmp_path / 'a.txt').read_text() == 'old'


def test_drafts_of_killed_processes_are_deleted(tmp_path):
  for name, age in (('.a.1.draft', 1000), ('.b.2.draft', 0)):
    (tmp_path / name).mkdir()
    (tmp_path / name / 'part').write_text('half')
    stamp = os.stat(tmp_path).st_mtime - age
    os.utime(tmp_path / name, (stamp, stamp))
  with files.draft(tmp_path / 'c', folder=True) as mine:
    stamp = mine.stat().st_mtime - 1000
    os.utime(mine, (stamp, stamp))
    files.write_text(tmp_path / 'd', '')
    assert mine.is_dir()
  assert sorted(p.name for p in tmp_path.iterdir()) == ['.b.2.draft', 'c', 'd']


def test_a_draft_that_cannot_be_made_names_its_folder(tmp_path, monkeypatch):
  def fail(**names):
    path = f'{names["dir"]}/{names["prefix"]}x{names["suffix"]}'
    raise OSError(30, 'Read-only file system', path)

  for name in ('mkstemp', 'mkdtemp'):
    monkeypatch.setattr(tempfile, name, fail)
  for folder in (False, True):
    with (
      pytest.raises(InputError) as raised,
      files.draft(tmp_path / 'a', folder=folder),
    ):
      pass
    assert str(raised.value) == f'cannot use {tmp_path}: Read-only file system'


def test_an_error_of_the_system_names_the_path(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(InputError, match='cannot use .*file.*: '):
    files.write_text(tmp_path / 'file' / 'a', 'text')
  with pytest.raises(InputError, match='cannot use .*none.npz: No such file'):
    files.read_npz(tmp_path / 'none.npz')


@pytest.mark.parametrize(
  ('path', 'words'),
  [
    ('gs://bucket/run', 'gs is not supported'),
    ('gs:/bucket/run', 'gs is not supported'),
    ('s3://bucket/run', 's3 is not supported'),
    ('', 'is empty'),
    ('a\nb', 'control characters'),
    ('~nobody-of-this-name/x', 'cannot expand'),
  ],
)
def test_paths_that_are_none_are_refused(path, words):
  with pytest.raises(InputError, match=words):
    files.local(path)


def test_the_home_folder_is_expanded(monkeypatch, tmp_path):
  monkeypatch.setenv('HOME', str(tmp_path))
  assert files.local('~/run') == tmp_path / 'run'
  assert files.local('a/~/b') == pathlib.Path('a/~/b')


# Few signs: to draw of all that there are takes half a minute to prepare.
TEXTS = st.text('ab"\\\n\u00e9\u2028\U0001f600', max_size=5)


@hypothesis.given(
  content=st.dictionaries(
    TEXTS,
    st.one_of(st.floats(allow_nan=False), st.integers(), TEXTS, st.none()),
    max_size=5,
  )
)
def test_seals_survive_json_and_notice_changes(content):
  sealed = json.loads(json.dumps(files.seal(content)))
  assert files.is_sealed(sealed)
  assert not files.is_sealed(sealed | {'another': 1, 'and': 2})
  del sealed['sha256']
  assert not files.is_sealed(sealed)


@pytest.mark.parametrize(
  'text',
  ['', '{', '[1]', '7', '[' * 100_000, '{"a": "\xff'],
  ids=['empty', 'brace', 'list', 'number', 'deep', 'bytes'],
)
def test_what_is_no_json_object_is_named(tmp_path, text):
  (tmp_path / 'a.json').write_bytes(text.encode('latin1'))
  with pytest.raises(files.DamagedError, match='a.json is damaged') as raised:
    files.read_json(tmp_path / 'a.json')
  assert len(str(raised.value).splitlines()) == 1
