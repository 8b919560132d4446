"""What a run was started with: it is compared, and no other run goes on."""

import json

import numpy as np
import pytest

from nemo_jax import InputError, runs
from nemo_jax.core import files
from nemo_jax.runs import folder
from tests.runs import fronts

FLAGS = {'seed': 0, 'species': ['gcn'], 'rate': 0.1}
DIGESTS = {'weights': 'a1', 'labels of the search': 'b2'}


def begin(workdir, flags=FLAGS, digests=DIGESTS):
  with runs.started(workdir, flags, digests) as (run, front):
    return run, front


def test_changed_flags_are_refused_and_named(tmp_path):
  runs.check_flags(tmp_path, {'seed': 0})
  runs.write_flags(tmp_path, {'seed': 0, 'species': ['gcn'], 'rate': 0.1})
  runs.check_flags(tmp_path, {'seed': 0, 'species': ['gcn'], 'rate': 0.1})
  with pytest.raises(InputError, match=r'seed=0 became 1.*another --workdir'):
    runs.check_flags(tmp_path, {'seed': 1, 'species': ['gcn'], 'rate': 0.1})
  with pytest.raises(InputError, match=r"species=\['gcn'\] became"):
    runs.check_flags(tmp_path, {'seed': 0, 'species': [], 'rate': 0.1})


def test_damaged_flags_are_refused_in_one_line(tmp_path):
  (tmp_path / 'flags.json').write_text('{"seed"')
  with pytest.raises(InputError, match=r'flags.json is damaged') as caught:
    runs.check_flags(tmp_path, {'seed': 0})
  assert '\n' not in str(caught.value)


def test_what_a_run_read_is_compared_and_named(tmp_path):
  runs.write_flags(tmp_path, FLAGS, DIGESTS)
  runs.check_flags(tmp_path, FLAGS)
  runs.check_flags(tmp_path, FLAGS, {'weights': 'a1'})
  runs.check_flags(tmp_path, FLAGS, DIGESTS)
  mended = DIGESTS | {'labels of the search': 'c3'}
  with pytest.raises(InputError, match=r'\(labels of the search changed\)'):
    runs.check_flags(tmp_path, FLAGS, mended)
  with pytest.raises(InputError, match='bank: not recorded'):
    runs.check_flags(tmp_path, FLAGS, {'bank': 'd4'})


@pytest.mark.parametrize(
  ('old', 'new'), [('"a1"', '"a2"'), ('"seed": 0', '"seed": 1')]
)
def test_flags_that_are_not_as_written_are_damaged(tmp_path, old, new):
  runs.write_flags(tmp_path, FLAGS, DIGESTS)
  path = tmp_path / 'flags.json'
  assert path.read_text().count(old) == 1
  path.write_text(path.read_text().replace(old, new))
  with pytest.raises(files.DamagedError, match='flags.json is damaged'):
    runs.check_flags(tmp_path, {})


def test_a_refused_run_leaves_no_folder(tmp_path, monkeypatch):
  with pytest.raises(InputError):
    begin(tmp_path / 'a\nb')
  runs.write_flags(tmp_path / 'old', FLAGS, DIGESTS)
  before = sorted(tmp_path.rglob('*'))
  with pytest.raises(InputError, match='seed=0 became 1'):
    begin(tmp_path / 'old', FLAGS | {'seed': 1})
  assert sorted(tmp_path.rglob('*')) == before


def test_flags_are_checked_again_under_the_lock(tmp_path, monkeypatch):
  locked = folder.locked

  def late(workdir):
    # Another process was faster.
    runs.write_flags(workdir, FLAGS | {'seed': 7}, DIGESTS)
    return locked(workdir)

  monkeypatch.setattr(folder, 'locked', late)
  with pytest.raises(InputError, match='seed=7 became 0'):
    begin(tmp_path)
  content = json.loads((tmp_path / 'flags.json').read_text())
  assert content['seed'] == 7


def test_errors_of_the_system_within_a_run_name_its_folder(tmp_path):
  with (
    pytest.raises(InputError, match=f'cannot use {tmp_path}: No space left'),
    runs.started(tmp_path, FLAGS, DIGESTS),
  ):
    raise OSError(28, 'No space left on device')


def test_a_run_that_has_ended_is_read_without_a_lock(tmp_path, monkeypatch):
  """As on a read-only disk."""
  run, front = begin(tmp_path)
  assert front is None
  fronts.empty(run).save(tmp_path)
  for name in ('locked', 'write_flags'):
    monkeypatch.setattr(folder, name, pytest.fail)
  monkeypatch.setattr(files, 'draft', pytest.fail)
  assert begin(tmp_path) == (run, fronts.empty(run))
  with pytest.raises(InputError, match='seed=0 became 1'):
    begin(tmp_path, FLAGS | {'seed': 1})


def test_the_front_of_another_run_does_not_end_this_one(tmp_path):
  run, _ = begin(tmp_path)
  fronts.empty('another').save(tmp_path)
  assert begin(tmp_path) == (run, None)
  fronts.empty(run).save(tmp_path)
  path = tmp_path / 'front.json'
  path.write_bytes(path.read_bytes().replace(b'points', b'pointz'))
  with pytest.warns(UserWarning, match='damaged.*; it is written again'):
    assert begin(tmp_path) == (run, None)


@pytest.mark.parametrize('kind', ['checkpoints', 'front', 'compare'])
def test_results_without_flags_are_of_whoever_made_them(tmp_path, kind):
  run, _ = begin(tmp_path)
  if kind == 'checkpoints':
    manager = runs.open_checkpoints(tmp_path)
    runs.save(manager, 1, {'generation': np.int32(1)}, run)
    manager.close()
  elif kind == 'front':
    fronts.empty(run).save(tmp_path)
  else:
    (tmp_path / 'compare.json').write_text(json.dumps({'run': run}))
  (tmp_path / 'flags.json').unlink()
  for flags, digests in (
    (FLAGS | {'seed': 1}, DIGESTS),
    (FLAGS, DIGESTS | {'weights': 'a2'}),
  ):
    with pytest.raises(InputError, match='results but no flags.json'):
      begin(tmp_path, flags, digests)
    assert not (tmp_path / 'flags.json').exists()
  assert begin(tmp_path)[0] == run
