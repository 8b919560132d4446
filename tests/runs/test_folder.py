"""A run's folder: what survives a kill, and what is refused."""

import json
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemo_jax import InputError, runs
from nemo_jax.core import files
from tests.runs import fronts


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
    ('front.json', lambda: runs.Front.load(tmp_path)),
  ):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError) as caught:
      read()
    assert '\n' not in str(caught.value)


def test_the_home_folder_is_meant_by_all_functions(tmp_path, monkeypatch):
  (tmp_path / 'home').mkdir()
  (tmp_path / 'here').mkdir()
  monkeypatch.setenv('HOME', str(tmp_path / 'home'))
  monkeypatch.chdir(tmp_path / 'here')
  folder = '~/run'
  runs.check_folder(folder)
  with runs.started(folder, {}, {}) as (run, _):
    pass
  runs.check_flags(folder, {}, {})
  checkpoints = runs.open_checkpoints(folder)
  runs.save(checkpoints, 1, start(), run)
  runs.append_metrics(folder, {'generation': 1})
  runs.rewind_metrics(folder, 1)
  assert runs.read_metrics(folder) == [{'generation': 1}]
  fronts.empty(run).save(folder)
  assert runs.finished(folder, run) == runs.Front.load('~/run/')
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
    lambda path: runs.started(path, {}, {}).__enter__(),
    lambda path: runs.check_flags(path, {}),
    lambda path: runs.write_flags(path, {}),
    runs.open_checkpoints,
    lambda path: runs.append_metrics(path, {'generation': 1}),
    runs.read_metrics,
    lambda path: runs.rewind_metrics(path, 1),
    fronts.toy().save,
    runs.Front.load,
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
