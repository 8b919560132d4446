"""`python -m experiments.search` as a user runs it, kills it and resumes it."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import moocore
import numpy as np
import pytest

from nemo_jax.core import files

ROOT = pathlib.Path(__file__).parents[2]
SMALL = (
  '--species=direct,gcn',
  '--population=8',
  '--generations=8',
  '--calibration=min_max',
  '--reconstruct=',
  '--sensitivities=none',
)
PICTURES = ('front_3d.png', 'front_projections.png', 'species.png', 'bits.png')


def command(workdir, cache, *flags, module='experiments.search'):
  return [
    sys.executable,
    '-m',
    module,
    f'--workdir={workdir}',
    f'--cache={cache}',
    *flags,
  ]


@pytest.fixture(scope='module')
def search(cache, digits):
  del digits  # only makes sure that the weights are there

  def run(workdir, *flags):
    return subprocess.run(
      command(workdir, cache, *flags),
      cwd=ROOT,
      capture_output=True,
      text=True,
      check=False,
    )

  return run


@pytest.fixture(scope='module')
def finished(search, tmp_path_factory):
  """The folder and the output of an uninterrupted run."""
  workdir = tmp_path_factory.mktemp('finished')
  done = search(workdir, *SMALL)
  assert done.returncode == 0, done.stderr
  return workdir, done.stdout


def kill_and_resume(workdir, cache, flags, kills, seed):
  """Runs the search to its end through `kills` deaths; returns those seen."""
  draw, deaths = random.Random(seed), 0
  while True:
    process = subprocess.Popen(
      command(workdir, cache, *flags),
      cwd=ROOT,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    if deaths >= kills:
      output, _ = process.communicate()
      assert process.returncode == 0, output
      return deaths
    before = progress(workdir)
    # Wait for it to search, so that a kill does not always hit the start.
    while process.poll() is None and progress(workdir) == before:
      time.sleep(0.02)
    time.sleep(draw.uniform(0, 0.6))
    if process.poll() is None:
      os.kill(process.pid, signal.SIGKILL)
      deaths += 1
    process.communicate()


def progress(workdir) -> int:
  path = pathlib.Path(workdir) / 'metrics.jsonl'
  return path.read_text().count('\n') if path.exists() else 0


def test_a_run_leaves_what_it_promises(finished):
  workdir, output = finished
  for name in ('flags.json', 'metrics.jsonl', 'front.json', *PICTURES):
    assert (workdir / name).stat().st_size > 0, name
  assert len((workdir / 'metrics.jsonl').read_text().splitlines()) == 8
  assert (workdir / 'checkpoints' / '8').is_dir()
  for word in ('float', 'uniform 8-bit', 'uniform 2-bit', 'test accuracy'):
    assert word in output


def test_the_front_has_its_schema_and_no_dominated_point(finished):
  front = json.loads((finished[0] / 'front.json').read_text())
  assert front['version'] == 2
  assert files.is_sealed(front)
  assert front['workload'] == 'digits'
  assert front['seed'] == 0
  assert front['evaluations'] == 64
  assert front['failures'] == 0
  assert {'jax', 'nemo_jax', 'python'} <= front['versions'].keys()
  assert front['objective_names'] == ['top1_error', 'size', 'bit_operations']
  assert front['bit_widths'] == [2, 3, 4, 5, 6, 7, 8]
  assert len(front['quantizers']) == 20
  for point in front['points']:
    assert len(point['bits']) == 20
    assert set(point['bits']) <= set(front['bit_widths'])
    assert 0 <= point['test_accuracy'] <= 1
    assert point['species'] in front['species']
  values = np.asarray([p['objectives'] for p in front['points']])
  assert values.shape[1] == 3
  assert moocore.is_nondominated(values, keep_weakly=False).all()


def test_the_same_command_again_says_that_it_is_done(finished, search):
  workdir, _ = finished
  before = (workdir / 'front.json').read_bytes()
  again = search(workdir, *SMALL)
  assert again.returncode == 0
  assert 'all 8 generations of this run are done' in again.stdout
  assert (workdir / 'front.json').read_bytes() == before


@pytest.mark.slow
def test_killed_at_random_it_finds_the_same_front(finished, tmp_path, cache):
  deaths = kill_and_resume(tmp_path, cache, SMALL, 1, seed=0)
  assert deaths == 1
  for name in ('front.json', 'metrics.jsonl'):
    assert (tmp_path / name).read_bytes() == (finished[0] / name).read_bytes()


def test_changed_flags_are_refused_and_nothing_is_lost(finished, search):
  workdir, _ = finished
  names = ('flags.json', 'metrics.jsonl', 'front.json')
  before = [(workdir / name).read_bytes() for name in names]
  refused = search(workdir, *SMALL, '--seed=1')
  assert refused.returncode == 1
  assert 'seed=0 became 1' in refused.stderr
  assert len(refused.stderr.strip().splitlines()) == 1
  assert before == [(workdir / name).read_bytes() for name in names]


def slow_case(value):
  return pytest.param(value, marks=pytest.mark.slow)


def slow(flag, words):
  return pytest.param(flag, words, marks=pytest.mark.slow)


@pytest.mark.parametrize(
  ('flag', 'words'),
  [
    (
      '--workload=mnist',
      "unknown workload 'mnist'; the choices are cifar10_resnet20, digits",
    ),
    ('--species=direct,ants', "unknown species 'ants'; the choices are boltz"),
    slow('--species=gcn:Adam', "unknown algorithm 'Adam'; the choices are ARS"),
    slow(
      '--objectives=speed,size', "unknown objective 'speed'; the choices are"
    ),
    slow(
      '--objectives=size,top1_error', "first objective is 'size'; the choices"
    ),
    slow('--bit_widths=0,4', 'from 2 to 16'),
    ('--species=', 'there are no species'),
    slow('--species=direct,direct', 'give each once'),
    slow('--species=paper,gcn', 'give each once'),
    slow('--evaluations=5', 'less than one generation of --population=60'),
    slow('--cache=README.md/x', 'README.md is no folder to write to'),
    slow('--extra_ops=mul', "'mul'; the choices are add, pool"),
    ('--population=7', 'population of 7 is too small for 4 species'),
  ],
)
def test_bad_input_is_one_line_and_starts_no_run(search, tmp_path, flag, words):
  refused = search(tmp_path / 'run', flag)
  assert refused.returncode == 1
  assert words in refused.stderr
  assert len(refused.stderr.strip().splitlines()) == 1
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  'what', ['weights', 'labels of the search', slow_case('bank')]
)
def test_what_a_run_read_and_changed_is_named(finished, tmp_path, search, what):
  workdir, _ = finished
  flags = json.loads((workdir / 'flags.json').read_text())
  flags['digests'][what] = 'old'
  (tmp_path / 'flags.json').write_text(json.dumps(files.seal(flags)))
  refused = search(tmp_path, *SMALL)
  assert refused.returncode == 1
  assert f'({what} changed)' in refused.stderr
  assert len(refused.stderr.strip().splitlines()) == 1
  assert [p.name for p in tmp_path.iterdir()] == ['flags.json']


def test_all_that_decides_a_result_is_digested(finished):
  flags = json.loads((finished[0] / 'flags.json').read_text())
  assert files.is_sealed(flags)
  parts = {
    f'{part} of the {use}'
    for part in ('images', 'labels')
    for use in ('calibration', 'search', 'test')
  }
  own = {'weights', 'bank', 'sensitivities'}
  assert set(flags['digests']) == parts | own
  assert all(len(digest) == 64 for digest in flags['digests'].values())


def test_a_list_that_is_not_of_numbers_is_named(search, tmp_path):
  refused = search(tmp_path / 'run', '--bit_widths=2,four')
  assert refused.returncode == 1
  assert "--bit_widths=2,four: 'four' is no whole number" in refused.stderr
  assert 'Traceback' not in refused.stderr


def test_help_names_every_flag(search, tmp_path):
  shown = search(tmp_path, '--help')
  for name in ('workload', 'species', 'objectives', 'evaluations', 'seed'):
    assert f'--{name}' in shown.stdout or f'--[no]{name}' in shown.stdout


@pytest.mark.slow
def test_killed_often_with_all_species_it_finds_the_same_front(
  search, tmp_path, cache
):
  flags = ('--population=20', '--generations=12')
  whole = search(tmp_path / 'whole', *flags)
  assert whole.returncode == 0, whole.stderr
  hurt = tmp_path / 'hurt'
  assert kill_and_resume(hurt, cache, flags, 10, seed=1) == 10
  for name in ('front.json', 'metrics.jsonl'):
    expected = (tmp_path / 'whole' / name).read_bytes()
    assert (hurt / name).read_bytes() == expected


@pytest.mark.slow
def test_the_default_run_beats_every_uniform_configuration(search, tmp_path):
  done = search(tmp_path)
  assert done.returncode == 0, done.stderr
  front = json.loads((tmp_path / 'front.json').read_text())
  assert front['hypervolume'] > front['uniform_hypervolume']


@pytest.mark.slow
@pytest.mark.parametrize(
  'flags',
  [
    ('--objectives=divergence,size',),
    ('--objectives=cross_entropy,top5_error,size,bit_operations_larger',),
    ('--extra_ops=add,pool', '--data_flow', '--weight_scheme=asymmetric'),
    ('--bit_widths=2,4,8,16', '--calibration=percentile'),
    ('--species=gcn:SNES,gcn:SimpleGA,floor', '--batch_size=4'),
    ('--species=boltzmann', '--evaluations=24', '--seed=3'),
    ('--species=paper',),
    ('--species=direct,gcn', '--sensitivities=none'),
    ('--species=lagrangian,priced_gcn:SNES', '--reconstruct='),
    ('--sensitivities=first_order', '--reconstruct='),
  ],
  ids=lambda flags: ' '.join(flags),
)
def test_options_run_to_the_end(search, tmp_path, flags):
  done = search(tmp_path, '--population=12', '--generations=2', *flags)
  assert done.returncode == 0, done.stderr
  front = json.loads((tmp_path / 'front.json').read_text())
  assert front['evaluations'] == 24
  assert front['points']
