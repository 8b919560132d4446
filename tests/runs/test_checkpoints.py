"""Checkpoints: one that cannot be used takes no other along."""

import errno
import json
import os
import resource
import shutil

import jax
import numpy as np
import pytest

from nemo_jax import InputError
from nemo_jax.core import files
from nemo_jax.runs import checkpoints

NOTHING = {'generation': np.int32(0), 'x': np.arange(300, dtype=np.float32)}


def at(generation):
  return jax.tree.map(lambda x: x + x.dtype.type(generation), NOTHING)


def same(state, generation):
  jax.tree.map(np.testing.assert_array_equal, state, at(generation))
  return True


@pytest.fixture
def three(tmp_path):
  """The workdir of a run with checkpoints 1, 2 and 3."""
  manager = checkpoints.open_checkpoints(tmp_path)
  for generation in (1, 2, 3):
    checkpoints.save(manager, generation, at(generation), 'mine')
  manager.close()
  return tmp_path


def empty(path):
  shutil.rmtree(path)
  path.mkdir()


def digest_is(text):
  return lambda path: (path / 'digest' / 'metadata').write_text(text)


def without(name):
  return lambda path: shutil.rmtree(path / name)


def of_bytes(content):
  def spoil(path):
    for file in path.rglob('*'):
      if file.is_file():
        file.write_bytes(content)

  return spoil


def replaced(make):
  def spoil(path):
    shutil.rmtree(path)
    make(path)

  return spoil


SPOILT = {
  'empty': empty,
  'no files': lambda path: [p.unlink() for p in path.rglob('*') if p.is_file()],
  'no leaves': without('leaves'),
  'no digest': without('digest'),
  'metadata alone': lambda path: [
    without(x)(path) for x in ('leaves', 'digest')
  ],
  'empty files': of_bytes(b''),
  'zeros': of_bytes(bytes(50)),
  'deep brackets': of_bytes(b'[' * 100_000),
  'link': replaced(lambda path: path.symlink_to('/etc')),
  'broken link': replaced(lambda path: path.symlink_to('/none')),
  'file': replaced(lambda path: path.write_text('')),
  'list': digest_is('[]'),
  'null': digest_is('null'),
  'number': digest_is('7'),
  'other key': digest_is('{"sha257": "0"}'),
  'other run': digest_is('{"sha256": "0", "run": "mine"}'),
  'bytes': lambda path: (path / 'digest' / 'metadata').write_bytes(b'\xff\xfe'),
}


@pytest.mark.parametrize('spoil', SPOILT.values(), ids=SPOILT.keys())
def test_a_spoilt_checkpoint_falls_back_and_is_written_again(three, spoil):
  spoil(three / 'checkpoints' / '3')
  manager = checkpoints.open_checkpoints(three)
  state, notes = checkpoints.restore(manager, NOTHING, 'mine')
  assert same(state, 2)
  assert all(len(note.splitlines()) == 1 for note in notes)
  checkpoints.discard_after(manager, 2)
  checkpoints.save(manager, 3, at(3), 'mine')
  manager.close()
  manager = checkpoints.open_checkpoints(three)
  state, notes = checkpoints.restore(manager, NOTHING, 'mine')
  assert same(state, 3)
  assert notes == []


@pytest.mark.parametrize(
  'name', ['7', '07', 'notes', '3.orbax-checkpoint-tmp-9']
)
def test_stray_folders_do_no_harm(three, name):
  (three / 'checkpoints' / name).mkdir()
  manager = checkpoints.open_checkpoints(three)
  state, _ = checkpoints.restore(manager, NOTHING, 'mine')
  assert same(state, 3)
  checkpoints.discard_after(manager, 3)
  for generation in (4, 5):
    checkpoints.save(manager, generation, at(generation), 'mine')
  state, _ = checkpoints.restore(manager, NOTHING, 'mine')
  assert same(state, 5)


def test_links_are_deleted_and_not_followed(three, tmp_path_factory):
  outside = tmp_path_factory.mktemp('outside')
  (outside / 'kept').write_text('')
  for name in ('2', '9', '4.orbax-checkpoint-tmp-1'):
    path = three / 'checkpoints' / name
    if path.exists():
      shutil.rmtree(path)
    path.symlink_to(outside)
  manager = checkpoints.open_checkpoints(three)
  state, _ = checkpoints.restore(manager, NOTHING, 'mine')
  assert same(state, 3)
  checkpoints.discard_after(manager, 3)
  for generation in (4, 5, 6):
    checkpoints.save(manager, generation, at(generation), 'mine')
  assert (outside / 'kept').exists()
  left = sorted(p.name for p in (three / 'checkpoints').iterdir())
  assert left == ['4', '5', '6']


def test_those_of_another_run_are_not_resumed(three):
  manager = checkpoints.open_checkpoints(three)
  with pytest.raises(InputError, match='of a run with other flags or files'):
    checkpoints.restore(manager, NOTHING, 'yours')
  path = three / 'checkpoints' / '3' / 'digest' / 'metadata'
  content = json.loads(path.read_text())
  path.write_text(json.dumps(content | {'run': 'yours'}))
  state, notes = checkpoints.restore(manager, NOTHING, 'mine')
  assert same(state, 2)
  assert len(notes) == 1


@pytest.mark.parametrize('limit', [0, 10, 200])
def test_what_the_system_refuses_is_one_line_and_leaves_nothing(
  three, limit, caplog
):
  """A limit on the size of files, which a full disk is like."""
  manager = checkpoints.open_checkpoints(three)
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
  try:
    with pytest.raises(InputError) as raised:
      checkpoints.save(manager, 4, at(4), 'mine')
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert str(raised.value) == (
    f'cannot use {three / "checkpoints"}: {os.strerror(errno.EFBIG)}'
  )
  # orbax logs tracebacks from its threads.
  assert not [r for r in caplog.records if r.levelname == 'ERROR']
  left = sorted(p.name for p in (three / 'checkpoints').iterdir())
  assert left == ['1', '2', '3']
  manager = checkpoints.open_checkpoints(three)
  checkpoints.save(manager, 4, at(4), 'mine')
  assert same(checkpoints.restore(manager, NOTHING, 'mine')[0], 4)


def causes() -> list[Exception]:
  full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
  wrapped = RuntimeError('saving failed')
  wrapped.__cause__ = full
  words = ValueError(
    'RESOURCE_EXHAUSTED: [OS error 28: No space left on device] [source ...]'
  )
  return [full, wrapped, words]


@pytest.mark.parametrize('error', causes(), ids=['plain', 'cause', 'words'])
def test_a_full_disk_is_found_behind_what_orbax_raises(
  three, monkeypatch, error
):
  manager = checkpoints.open_checkpoints(three)

  def fail(*args, **kwargs):
    raise error

  monkeypatch.setattr(manager, 'save', fail)
  with pytest.raises(InputError, match='checkpoints: No space left on device'):
    checkpoints.save(manager, 4, at(4))
  error = TypeError('not an array')
  monkeypatch.setattr(manager, 'save', fail)
  with pytest.raises((TypeError, InputError)):
    checkpoints.save(manager, 4, at(4))


def test_a_checkpoint_says_what_it_holds(three):
  path = three / 'checkpoints' / '2' / 'digest' / 'metadata'
  content = json.loads(path.read_text())
  leaves = jax.tree.leaves(at(2))
  assert content == {'sha256': files.digest(leaves), 'run': 'mine'}
