"""A run's folder: what survives a kill, and what is refused."""

import contextlib
import json
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemo_jax import InputError
from nemo_jax.core import files
from nemo_jax import runs


class State(NamedTuple):
  generation: jax.Array
  values: dict


def start():
  return State(
    jnp.zeros((), jnp.int32),
    {'a': jnp.zeros((64, 3), jnp.float32), 'b': jnp.zeros(5, bool)},
  )


@jax.jit
def step(state):
  generation = state.generation + 1
  noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), generation))
  values = {'a': state.values['a'] + noise, 'b': ~state.values['b']}
  return State(generation, values), {'generation': generation, 'x': noise}


def run(workdir, generations):
  checkpoints = runs.open_checkpoints(workdir)
  state, notes = runs.restore(checkpoints, start())
  runs.discard_after(checkpoints, int(state.generation))
  runs.rewind_metrics(workdir, int(state.generation))
  for last, _ in runs.evolve(workdir, checkpoints, step, state, generations):
    state = last
  checkpoints.close()
  return state, notes


def same(one, two):
  jax.tree.map(np.testing.assert_array_equal, one, two)


def data_files(workdir, generation):
  folder = pathlib.Path(workdir) / 'checkpoints' / str(generation) / 'leaves'
  return [f for f in folder.rglob('*') if f.is_file() and f.parent.name == 'd']


def test_a_run_in_two_parts_is_the_run_in_one(tmp_path):
  whole, _ = run(tmp_path / 'whole', 6)
  run(tmp_path / 'parts', 2)
  parts, notes = run(tmp_path / 'parts', 6)
  assert notes == []
  same(whole, parts)
  lines = [runs.read_metrics(tmp_path / d) for d in ('whole', 'parts')]
  assert lines[0] == lines[1]
  assert [m['generation'] for m in lines[0]] == list(range(1, 7))


@pytest.mark.parametrize('damage', ['cut', 'flipped', 'emptied', 'removed'])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, damage):
  whole, _ = run(tmp_path / 'whole', 6)
  run(tmp_path / 'hurt', 4)
  for file in data_files(tmp_path / 'hurt', 4):
    content = bytearray(file.read_bytes())
    if damage == 'removed':
      file.unlink()
      continue
    if damage == 'cut':
      content = content[: len(content) // 2]
    elif damage == 'flipped':
      for i in range(0, len(content), 7):
        content[i] ^= 0xFF
    else:
      content = b''
    file.write_bytes(bytes(content))
  hurt, notes = run(tmp_path / 'hurt', 6)
  assert len(notes) == 1
  assert notes[0].startswith('checkpoint 4 is damaged (')
  assert '\n' not in notes[0]
  same(whole, hurt)
  assert runs.read_metrics(tmp_path / 'hurt') == runs.read_metrics(
    tmp_path / 'whole'
  )


def test_values_that_do_not_match_their_checksum_are_noticed(tmp_path):
  run(tmp_path, 3)
  digest = tmp_path / 'checkpoints' / '3' / 'digest' / 'metadata'
  digest.write_text(json.dumps({'sha256': '0' * 64}))
  _, notes = run(tmp_path, 3)
  assert 'checksum' in notes[0]


def test_with_every_checkpoint_damaged_the_run_is_refused(tmp_path):
  run(tmp_path, 4)
  for generation in (2, 3, 4):
    for file in data_files(tmp_path, generation):
      file.write_bytes(b'')
  with pytest.raises(InputError, match='no readable checkpoint in .*delete'):
    run(tmp_path, 6)


def test_a_checkpoint_that_was_being_written_is_not_seen(tmp_path):
  run(tmp_path, 3)
  half = tmp_path / 'checkpoints' / '4.orbax-checkpoint-tmp'
  half.mkdir()
  (half / 'leaves').write_text('half')
  state, notes = run(tmp_path, 5)
  assert notes == []
  assert int(state.generation) == 5


@pytest.mark.filterwarnings('ignore:.*left out')
def test_a_line_that_was_being_written_is_left_out(tmp_path):
  run(tmp_path, 3)
  with open(tmp_path / 'metrics.jsonl', 'a') as file:
    file.write('{"generation": 4, "x"')
  assert len(runs.read_metrics(tmp_path)) == 3
  run(tmp_path, 5)
  assert [m['generation'] for m in runs.read_metrics(tmp_path)] == [
    1,
    2,
    3,
    4,
    5,
  ]


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


def test_infinities_are_null_in_metrics(tmp_path):
  values = {'generation': 1, 'utility': np.asarray([1.0, np.inf, np.nan])}
  runs.append_metrics(tmp_path, values)
  assert runs.read_metrics(tmp_path) == [
    {'generation': 1, 'utility': [1.0, None, None]}
  ]


def test_a_front_of_another_version_or_none_is_refused(tmp_path):
  with pytest.raises(InputError, match='front.json: No such file'):
    runs.read_front(tmp_path)
  for version in ('99', '0', 'null', '"2"', '1.5', '[1]'):
    (tmp_path / 'front.json').write_text(f'{{"version": {version}}}')
    with pytest.raises(InputError, match='has version .*this package reads'):
      runs.read_front(tmp_path)
  runs.write_front(tmp_path, {'points': [{'bits': np.asarray([2, 8])}]})
  assert runs.read_front(tmp_path)['points'] == [{'bits': [2, 8]}]


def test_writing_leaves_nothing_beside_the_file(tmp_path):
  files.write_text(tmp_path / 'a.json', 'one')
  files.write_text(tmp_path / 'a.json', 'two')
  assert [p.name for p in tmp_path.iterdir()] == ['a.json']
  assert (tmp_path / 'a.json').read_text() == 'two'


def test_a_folder_that_cannot_be_is_named(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(InputError, match='file is no folder to write to'):
    runs.check_folder(tmp_path / 'file' / 'run')
  with pytest.raises(InputError, match='is empty'):
    runs.check_folder('')
  runs.check_folder(tmp_path / 'new' / 'run')
  assert not (tmp_path / 'new').exists()


def test_two_processes_do_not_share_a_folder(tmp_path):
  with (
    runs.locked(tmp_path),
    pytest.raises(InputError, match='another process is running in'),
    runs.locked(tmp_path),
  ):
    pass
  with runs.locked(tmp_path):
    pass


@pytest.mark.filterwarnings('ignore:.*left out')
@pytest.mark.parametrize('content', ['[1]', '3', 'null', '{"a":1}', 'x'])
def test_json_of_another_kind_is_refused_or_left_out(tmp_path, content):
  (tmp_path / 'metrics.jsonl').write_text(content + '\n{"generation": 1}\n')
  assert runs.read_metrics(tmp_path) == [{'generation': 1}]
  for name, read in (
    ('flags.json', lambda: runs.check_flags(tmp_path, {'seed': 0})),
    ('front.json', lambda: runs.read_front(tmp_path)),
  ):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError) as caught:
      read()
    assert '\n' not in str(caught.value)


FLAGS = {'seed': 0, 'species': ['gcn'], 'rate': 0.1}
DIGESTS = {'weights': 'a1', 'labels of the search': 'b2'}


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


def test_every_changed_byte_of_a_front_is_noticed(tmp_path):
  runs.write_front(tmp_path, {'seed': 3, 'points': [{'bits': [2, 8]}]})
  path = tmp_path / 'front.json'
  content, front = path.read_bytes(), runs.read_front(tmp_path)
  for place in range(len(content)):
    for change in (1, 16, 128):
      hurt = bytearray(content)
      hurt[place] ^= change
      path.write_bytes(hurt)
      found = None
      with contextlib.suppress(InputError):
        found = runs.read_front(tmp_path)
      # White space may become other white space.
      assert found in (None, front)


def test_fronts_of_version_1_are_read(tmp_path):
  front = {'version': 1, 'points': [{'bits': [2, 8]}]}
  path = tmp_path / 'front.json'
  path.write_text(json.dumps(front))
  assert runs.read_front(tmp_path) == front
  path.write_text(json.dumps(files.seal(front)))
  assert runs.read_front(tmp_path)['points'] == front['points']
  path.write_text(json.dumps(files.seal(front) | {'points': []}))
  with pytest.raises(files.DamagedError):
    runs.read_front(tmp_path)
  path.write_text(json.dumps(front | {'version': 2}))
  with pytest.raises(files.DamagedError):
    runs.read_front(tmp_path)


def begin(workdir, flags=FLAGS, digests=DIGESTS):
  with runs.started(workdir, flags, digests) as (run, front):
    return run, front


def test_a_refused_run_leaves_no_folder(tmp_path, monkeypatch):
  with pytest.raises(InputError):
    begin(tmp_path / 'a\nb')
  runs.write_flags(tmp_path / 'old', FLAGS, DIGESTS)
  before = sorted(tmp_path.rglob('*'))
  with pytest.raises(InputError, match='seed=0 became 1'):
    begin(tmp_path / 'old', FLAGS | {'seed': 1})
  assert sorted(tmp_path.rglob('*')) == before


def test_flags_are_checked_again_under_the_lock(tmp_path, monkeypatch):
  locked = runs.locked

  def late(workdir):
    # Another process was faster.
    runs.write_flags(workdir, FLAGS | {'seed': 7}, DIGESTS)
    return locked(workdir)

  monkeypatch.setattr(runs, 'locked', late)
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
  runs.write_front(tmp_path, {'run': run, 'points': []})
  for name in ('locked', 'write_flags'):
    monkeypatch.setattr(runs, name, pytest.fail)
  monkeypatch.setattr(files, 'draft', pytest.fail)
  assert begin(tmp_path) == (run, runs.read_front(tmp_path))
  with pytest.raises(InputError, match='seed=0 became 1'):
    begin(tmp_path, FLAGS | {'seed': 1})


def test_the_front_of_another_run_does_not_end_this_one(tmp_path):
  run, _ = begin(tmp_path)
  runs.write_front(tmp_path, {'run': 'another', 'points': []})
  assert begin(tmp_path) == (run, None)
  runs.write_front(tmp_path, {'run': run, 'points': []})
  path = tmp_path / 'front.json'
  path.write_bytes(path.read_bytes().replace(b'points', b'pointz'))
  with pytest.warns(UserWarning, match='damaged.*; it is written again'):
    assert begin(tmp_path) == (run, None)


@pytest.mark.parametrize('kind', ['checkpoints', 'front', 'compare'])
def test_results_without_flags_are_of_whoever_made_them(tmp_path, kind):
  run, _ = begin(tmp_path)
  if kind == 'checkpoints':
    manager = runs.open_checkpoints(tmp_path)
    runs.save(manager, 1, start(), run)
    manager.close()
  elif kind == 'front':
    runs.write_front(tmp_path, {'run': run, 'points': []})
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


def test_the_home_folder_is_meant_by_all_functions(tmp_path, monkeypatch):
  (tmp_path / 'home').mkdir()
  (tmp_path / 'here').mkdir()
  monkeypatch.setenv('HOME', str(tmp_path / 'home'))
  monkeypatch.chdir(tmp_path / 'here')
  folder = '~/run'
  runs.check_folder(folder)
  run, _ = begin(folder)
  runs.check_flags(folder, FLAGS, DIGESTS)
  checkpoints = runs.open_checkpoints(folder)
  runs.save(checkpoints, 1, start(), run)
  runs.append_metrics(folder, {'generation': 1})
  runs.rewind_metrics(folder, 1)
  assert runs.read_metrics(folder) == [{'generation': 1}]
  runs.write_front(folder, {'run': run})
  assert runs.finished(folder, run) == runs.read_front('~/run/')
  assert not list((tmp_path / 'here').iterdir())
  found = {p.name for p in (tmp_path / 'home' / 'run').iterdir()}
  assert {'flags.json', 'front.json', 'metrics.jsonl', 'checkpoints'} <= found


@pytest.mark.parametrize('path', ['gs://bucket/run', 's3://b/x', '', 'a\nb'])
def test_what_is_no_folder_is_refused_by_all_functions(
  path, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  for use in (
    runs.check_folder,
    begin,
    lambda path: runs.check_flags(path, {}),
    lambda path: runs.write_flags(path, {}),
    runs.open_checkpoints,
    lambda path: runs.append_metrics(path, {'generation': 1}),
    runs.read_metrics,
    lambda path: runs.rewind_metrics(path, 1),
    lambda path: runs.write_front(path, {}),
    runs.read_front,
    lambda path: runs.finished(path, ''),
  ):
    with pytest.raises(InputError):
      use(path)
  assert not list(tmp_path.iterdir())


def test_a_folder_that_is_read_only_serves_where_it_may(tmp_path, monkeypatch):
  monkeypatch.setattr('os.access', lambda path, mode: False)
  runs.check_folder(tmp_path, read_only=True)
  with pytest.raises(InputError, match='is no folder to write to'):
    runs.check_folder(tmp_path)
  with pytest.raises(InputError, match='is no folder to write to'):
    runs.check_folder(tmp_path / 'new', read_only=True)
