"""Commands with a workload, a species and a baseline of the user's own."""

import json
import subprocess
import sys

import pytest

from nemo_jax import Front
from tests import tiny
from tests.conftest import ROOT

WORKLOAD = """
import jax

from nemo_jax import InputError
from nemo_jax.data.labelled import Images
from nemo_jax.workloads import Network, Workload
from tests import tiny


def network(image_size):
  shapes = jax.eval_shape(tiny.variables)
  example = jax.ShapeDtypeStruct((1, tiny.FEATURES), 'float32')
  return Network(tiny.apply, shapes, example)


def check(sources):
  if sources.weights:
    raise InputError('mine has weights of its own')


def load(sources):
  parts = [Images(*tiny.examples(40, seed)) for seed in range(3)]
  return Workload('mine', tiny.apply, tiny.variables(), *parts)
"""
SPECIES = """
import jax
import jax.numpy as jnp

from nemo_jax import Species, SpeciesBuilder


def make(problem, population_size):
  logits = jnp.where(problem.allowed, 0.0, -jnp.inf)
  shape = population_size, len(problem.allowed)

  def ask(key, state):
    choices = jax.random.categorical(key, logits, shape=shape)
    return choices.astype(jnp.int32), state

  return Species(lambda key: (), ask, lambda key, state, feedback: state)


BUILDER = SpeciesBuilder(make)
"""
BASELINE = """
from nemo_jax.arena.baseline import Baseline


def search(key, problem, evaluations, score):
  rows = [[k] * len(problem.allowed) for k in range(problem.allowed.shape[1])]
  score(rows[:evaluations])


BASELINE = Baseline(search)
"""
QUICK = ('--reconstruct=', '--calibration=min_max', '--sensitivities=none')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  made = tmp_path_factory.mktemp('own')
  (made / 'mine.py').write_text(WORKLOAD)
  (made / 'chance.py').write_text(SPECIES)
  (made / 'rival.py').write_text(BASELINE)
  return made


def run(folder, name, *flags):
  """The output of a command on the workload, and its errors."""
  command = [sys.executable, '-m', f'experiments.{name}']
  own = f'--workload={folder / "mine.py"}', f'--cache={folder / "cache"}'
  done = subprocess.run(
    [*command, *own, *flags],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  return done.stdout, done.stderr if done.returncode else ''


@pytest.fixture(scope='module')
def searched(folder):
  """The folder of a search by the species, and what was printed."""
  flags = f'--workdir={folder / "run"}', '--population=4', '--evaluations=10'
  species = f'--species={folder / "chance.py"}'
  output, error = run(folder, 'search', species, *flags, *QUICK)
  assert not error
  return folder / 'run', output


def test_a_species_searches_a_workload(folder, searched):
  where, output = searched
  assert 'mine: 4 quantizers, 264 parameters' in output
  front = Front.load(where, tiny.apply, tiny.variables())
  assert front.workload == 'mine'
  assert front.evaluations == 8
  assert front.species == (str(folder / 'chance.py'),)
  assert front.points
  assert front.apply(0)(tiny.examples(3)[0]).shape == (3, tiny.CLASSES)


def test_points_of_a_front_are_scored_as_at_its_end(folder, searched):
  where, _ = searched
  output, error = run(folder, 'evaluate', f'--front={where}', *QUICK)
  assert not error
  lines = [json.loads(line) for line in output.splitlines()]
  front = Front.load(where)
  for line, point in zip(lines, front.points, strict=True):
    assert line['workload'] == 'mine'
    assert line['top1'] == pytest.approx(point.test_accuracy, abs=1e-5)
    assert line['size_bits'] == pytest.approx(8e6 * point.size_mb)


def test_a_baseline_is_compared(folder):
  rival = str(folder / 'rival.py')
  flags = f'--methods={rival},uniform', '--seeds=0', '--budget=60'
  where = f'--workdir={folder / "compared"}'
  output, error = run(
    folder, 'compare', where, *flags, *QUICK[:2], '--sensitivities=first_order'
  )
  assert not error
  assert f'| {rival} | ' in output
  results = json.loads((folder / 'compared' / 'compare.json').read_text())
  # It does what `uniform` does.
  assert results[rival]['0']['front'] == results['uniform']['0']['front']


def test_the_network_is_printed(folder):
  output, error = run(folder, 'workloads')
  assert not error
  assert 'quantizers   4: 2 weights, 2 activations' in output


@pytest.mark.parametrize(
  ('name', 'flags', 'words'),
  [
    ('search', ['--weights=README.md'], 'mine has weights of its own'),
    ('search', ['--species={}/rival.py'], 'rival.py'),
    pytest.param(
      'search',
      ['--workload={}/chance.py'],
      'chance.py',
      marks=pytest.mark.slow,
    ),
  ],
)
def test_what_is_no_file_of_the_kind_is_one_line(folder, name, flags, words):
  _, error = run(folder, name, *(flag.format(folder) for flag in flags))
  assert words in error
  assert error.startswith('error: ')
  assert len(error.splitlines()) == 1
