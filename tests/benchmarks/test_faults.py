"""The harness that damages files: it tells outcomes apart, and none is bad."""

import pathlib
import random
import subprocess
import sys

import pytest

from benchmarks import faults

ROOT = pathlib.Path(__file__).parents[2]
USUAL = faults.Ending(0, 'picture', '')


@pytest.mark.parametrize(
  ('status', 'errors', 'equal', 'outcome'),
  [
    (0, '', True, 'equal'),
    (0, 'warning: a.npz is damaged; it is made again', True, 'rebuilt'),
    (0, '', False, 'silent difference'),
    (0, 'warning: a.npz is damaged', False, 'silent difference'),
    (0, 'Traceback (most recent call last)', True, 'traceback'),
    (1, 'error: front.json is damaged', False, 'refused'),
    (1, 'warning: x\nerror: front.json is damaged', True, 'refused'),
    (1, 'Traceback (most\nerror: front.json', False, 'traceback'),
    (1, 'error: one\nerror: two', False, 'traceback'),
    (1, 'error: one\nand more', False, 'traceback'),
    (1, '', False, 'traceback'),
    (-11, '', True, 'traceback'),
    (None, '', False, 'hang'),
  ],
)
def test_outcomes_are_told_apart(status, errors, equal, outcome):
  ending = faults.Ending(status, 'picture', errors)
  assert faults.classify(ending, USUAL, equal) == outcome


@pytest.mark.parametrize('seed', range(20))
def test_one_file_is_damaged(tmp_path, seed):
  for name in ('a/x', 'a/y', 'b/z', 'empty'):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text('' if name == 'empty' else name * 9)
  read = lambda: {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}
  before = read()
  told = faults.damage(tmp_path, random.Random(seed))
  after = read()
  changed = [p for p in before if after.get(p) != before[p]]
  if 'empty' not in told:
    (path,) = changed
    assert str(path.relative_to(tmp_path)) in told


@pytest.mark.slow
def test_damages_are_noticed_or_change_nothing():
  command = [sys.executable, '-m', 'benchmarks.faults']
  done = subprocess.run(
    [*command, '--damages=20', '--seed=1'],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  counts = dict(line.rsplit(maxsplit=1) for line in done.stdout.splitlines())
  assert sum(map(int, counts.values())) == 20
  assert set(faults.BAD) <= counts.keys()
