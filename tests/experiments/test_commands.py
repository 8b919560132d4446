"""The experiments beside the search, as a user runs them, on the digits."""

import json
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
# What takes time is reconstruction, which has tests of its own.
QUICK = ('--reconstruct=', '--calibration=min_max')


@pytest.fixture(scope='module')
def run(cache, digits):
  """Runs an experiment with flags: its output, and its errors if it failed."""
  del digits  # only makes sure that the weights are there

  def run(name, *flags):
    command = [sys.executable, '-m', f'experiments.{name}', f'--cache={cache}']
    done = subprocess.run(
      [*command, *QUICK, *flags],
      cwd=ROOT,
      capture_output=True,
      text=True,
      check=False,
    )
    return done.stdout, done.stderr if done.returncode else ''

  return run


def slow(*values):
  return pytest.param(*values, marks=pytest.mark.slow)


def rows_of(table: str) -> list[list[str]]:
  """The cells of the lines of a Markdown table, without its head."""
  lines = re.findall(r'^\| (?!---)(.*) \|$', table, re.M)
  return [line.split(' | ') for line in lines][1:]


@pytest.mark.slow
def test_knapsacks_keep_to_their_budgets(run):
  output, error = run('knapsack', '--budgets=6,0.009MB,0.01G')
  assert not error
  six, small, quick = rows_of(output)
  assert float(small[1]) <= 0.009 < float(six[1])
  assert float(quick[2]) <= 0.01 < float(six[2])
  for row in (six, small, quick):
    assert float(row[3].removesuffix(' %')) >= -0.01
    assert 0 <= float(row[4]) <= 100


@pytest.mark.parametrize(
  ('name', 'flag', 'words'),
  [
    ('knapsack', '--budgets=5TB', "'5TB' is no budget; they are such as 1.5MB"),
    slow('knapsack', '--budgets=0.004MB', '0.004MB is too little: the fewest'),
    ('compare', '--methods=ants', "unknown species 'ants'"),
    slow(
      'compare', '--methods=direct@fast', "ablation 'fast'; the choices are un"
    ),
    slow('compare', '--methods=nemo@blind', "'lagrangian' cannot be without"),
    slow('compare', '--methods=nemo@', "ablation ''; the choices are un"),
    slow('compare', '--budget=21', 'leaves no generation of --population=20'),
    slow('compare', '--seeds=0,0', '--seeds=0,0: give each once'),
    slow('compare', '--objectives=size,divergence', 'then one or two of size'),
    ('compare', '--objectives=divergence,top1_error,size', 'then one or two'),
    slow(
      'transfer', '--budget=2', 'at least one generation of --population=20'
    ),
  ],
)
def test_bad_input_is_one_line(run, tmp_path, name, flag, words):
  where = [f'--workdir={tmp_path}'] if name == 'compare' else []
  _, error = run(name, *where, flag)
  assert words in error
  assert 'Traceback' not in error


def test_blas_has_one_thread():
  words = (
    'import threadpoolctl; from experiments.launch import launch; '
    'launch(lambda: print([x["num_threads"] for x in '
    'threadpoolctl.threadpool_info() if x["user_api"] == "blas"]))'
  )
  command = [sys.executable, '-c', words]
  told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  # Those of NumPy and of SciPy, which is the one that JAX calls.
  assert set(json.loads(told.stdout)) == {1}


@pytest.mark.slow
def test_evaluate_scores_the_digits(run):
  output, error = run('evaluate', '--bits=float,8,w2a8')
  assert not error
  lines = [json.loads(line) for line in output.splitlines()]
  assert [line['configuration'] for line in lines] == ['float', '8', 'w2a8']
  assert lines[0]['top1'] > 0.95


@pytest.mark.slow
def test_sensitivities_are_told_apart(run):
  output, error = run('sensitivity', '--configurations=60')
  assert not error
  found = {row[0]: row[1:] for row in rows_of(output)}
  assert set(found) == {
    'second_order',
    'first_order',
    'hessian_trace',
    'measured',
  }
  assert float(found['second_order'][1].split()[0]) > 0.9


@pytest.mark.slow
def test_compare_resumes_and_prints_its_tables(run, tmp_path):
  flags = (f'--workdir={tmp_path}', '--budget=60', '--population=8')

  def compared(*more):
    output, error = run('compare', *flags, *more)
    assert not error
    return output

  first = compared('--methods=lagrangian,uniform', '--seeds=0')
  assert '| lagrangian |' in first
  before = json.loads((tmp_path / 'compare.json').read_text())
  methods = '--methods=lagrangian,uniform,mckp,paper@featureless'
  second = compared(methods, '--seeds=0,1')
  assert 'of 2)' in second
  after = json.loads((tmp_path / 'compare.json').read_text())
  assert after['lagrangian']['0'] == before['lagrangian']['0']
  assert set(after['mckp']) == {'0', '1'}
  text = (tmp_path / 'summary.json').read_text()
  json.loads(text, parse_constant=pytest.fail)
  for name in ('summary.json', 'curves.png', 'attainment.png'):
    assert (tmp_path / name).stat().st_size > 0


@pytest.mark.slow
def test_what_was_learned_is_given_to_a_network(run):
  flags = '--source_budget=24', '--budget=24', '--population=8', '--seeds=0,1'
  output, error = run('transfer', *flags)
  assert not error
  assert [row[0] for row in rows_of(output)] == [
    'no evaluation',
    '24 evaluations',
  ]


def attacked(*words) -> subprocess.CompletedProcess:
  """What the harness of bad flags says."""
  command = [sys.executable, '-m', 'benchmarks.flags', *words]
  return subprocess.run(
    command, cwd=ROOT, capture_output=True, text=True, check=False
  )


def test_bad_flags_are_refused_and_good_ones_are_not():
  done = attacked('--experiment=evaluate', '--combinations=60')
  rows = [json.loads(line) for line in done.stdout.splitlines()]
  assert [row[1] for row in rows] == ['accepted', *['refused'] * 60], rows


@pytest.mark.slow
def test_bad_flags_of_every_experiment_are_refused():
  done = attacked('--combinations=504')
  assert done.returncode == 0, done.stdout
  assert '504 of 504 combinations are refused in one line' in done.stdout


@pytest.mark.slow
def test_flags_that_contradict_are_refused(run):
  _, error = run('evaluate', '--front=runs', '--bits=8')
  assert error == 'error: --front stands in place of --bits; give one of them\n'
  _, error = run('evaluate', '--points=0')
  assert error.startswith('error: --points are those of a front')
