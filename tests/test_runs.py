"""A run's folder: what survives a kill, and what is refused."""

import json
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemo_jax import InputError, files, runs


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
  with pytest.raises(InputError, match='cannot read'):
    runs.read_front(tmp_path)
  (tmp_path / 'front.json').write_text('{"version": 99}')
  with pytest.raises(InputError, match='version 99; this package reads 1'):
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
