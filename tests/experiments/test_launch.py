"""How experiments end: by a signal, an error, or a reader that has gone."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import pytest

from experiments import messages
from experiments.launch import explain
from nemo_jax.core.types import InputError

ROOT = pathlib.Path(__file__).parents[2]
STOPPED = 'stopped; the same command goes on from here\n'
QUICK = (
  '--species=direct,gcn',
  '--population=8',
  '--generations=12',
  '--calibration=min_max',
  '--reconstruct=',
  '--sensitivities=none',
)


def start(*words, **options):
  command = [sys.executable, *words]
  # Tests in the background may ignore Ctrl-C, and so would what they start.
  heard = signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    return subprocess.Popen(
      command,
      cwd=ROOT,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      **options,
    )
  finally:
    signal.signal(signal.SIGINT, heard)


def launched(code: str, *words, **options):
  """A program that launches a function `run` with flags."""
  program = f'from experiments.launch import launch\n{code}\nlaunch(run)'
  process = start('-c', program, *words, **options)
  output, errors = process.communicate(timeout=120)
  return process.returncode, output, errors


def search(workdir, cache, *flags):
  where = f'--workdir={workdir}', f'--cache={cache}'
  return start('-m', 'experiments.search', *where, *QUICK, *flags)


@pytest.mark.parametrize('seconds', [0.5, 1.5])
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_it_imports_is_one_line(tmp_path, seconds, number):
  process = search(tmp_path / 'run', tmp_path / 'cache')
  time.sleep(seconds)
  process.send_signal(number)
  output, errors = process.communicate(timeout=20)
  assert process.returncode == 128 + number
  assert errors == STOPPED
  assert 'Traceback' not in output


def progress(workdir) -> int:
  path = workdir / 'metrics.jsonl'
  return path.read_text().count('\n') if path.exists() else 0


@pytest.mark.slow
def test_a_run_that_is_stopped_at_any_moment_finds_the_same_front(
  tmp_path, cache, digits
):
  del digits
  whole, stopped = tmp_path / 'whole', tmp_path / 'stopped'
  process = search(whole, cache)
  _, errors = process.communicate()
  assert process.returncode == 0, errors
  numbers = (signal.SIGTERM, signal.SIGINT) * 2
  for number, generation in zip(numbers, (0, 1, 4, 8), strict=True):
    process = search(stopped, cache)
    while process.poll() is None and progress(stopped) < generation:
      time.sleep(0.01)
    time.sleep(0.3 * generation / 8 if generation else 4)
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 128 + number, errors
    assert errors == STOPPED
  process = search(stopped, cache)
  _, errors = process.communicate()
  assert process.returncode == 0, errors
  for name in ('front.json', 'metrics.jsonl'):
    assert (stopped / name).read_bytes() == (whole / name).read_bytes()


WAITING = """
import hashlib, os, signal, sys, time
from experiments import signals
"""


def test_a_signal_ends_a_call_that_does_not_return():
  # In C for hours, without Python's lock; XLA compiles like that.
  process = start(
    '-c',
    f'{WAITING}signals.stop_on_signals()\nprint("ready", flush=True)\n'
    'hashlib.pbkdf2_hmac("sha256", b"a", b"b", 2**31 - 1)',
  )
  assert process.stdout.readline() == 'ready\n'
  time.sleep(0.2)
  process.terminate()
  _, errors = process.communicate(timeout=20)
  assert (process.returncode, errors) == (143, STOPPED)


def test_a_signal_to_a_forked_process_is_its_own():
  process = start(
    '-c',
    f'{WAITING}signals.stop_on_signals()\n'
    'child = os.fork()\n'
    'if not child: time.sleep(60)\n'
    'time.sleep(0.2); os.kill(child, signal.SIGTERM)\n'
    'print(os.waitpid(child, 0)[1]); time.sleep(0.2); print("alive")',
  )
  output, errors = process.communicate(timeout=20)
  assert output.split() == [str(int(signal.SIGTERM)), 'alive']
  assert (process.returncode, errors) == (0, '')


def test_signals_that_are_ignored_stay_so():
  process = start(
    '-c',
    f'{WAITING}signal.signal(signal.SIGINT, signal.SIG_IGN)\n'
    'signals.stop_on_signals()\nos.kill(os.getpid(), signal.SIGINT)\n'
    'time.sleep(0.2); print("alive", flush=True)\n'
    'os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)',
  )
  output, errors = process.communicate(timeout=20)
  assert (process.returncode, output, errors) == (143, 'alive\n', STOPPED)


@pytest.mark.parametrize(
  ('error', 'line'),
  [
    (InputError('one\n  two'), 'one two'),
    (InputError('a\x1b[31m\udcff'), r'a\x1b[31m\udcff'),
    (NotImplementedError('cannot reach\nthis'), 'cannot reach this'),
    (
      OSError(28, 'No space left on device', 'runs/a\nb'),
      'cannot use runs/a b: No space left on device',
    ),
    (PermissionError(13, 'Permission denied'), 'Permission denied'),
    (OSError('short\nread'), 'short read'),
    (MemoryError(), 'out of memory'),
    (MemoryError('Unable to get\n1 GiB'), 'out of memory: Unable to get 1 GiB'),
  ],
)
def test_what_can_be_mended_is_one_line(error, line):
  assert explain(error) == line


def test_a_device_without_memory_is_one_line():
  error = jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: 9 bytes\nBuffers:\n')
  line = explain(error)
  assert line.startswith('out of memory: RESOURCE_EXHAUSTED: 9 bytes;')
  assert '--memory_gib' in line


@pytest.mark.parametrize(
  'error', [KeyError('a'), jax.errors.JaxRuntimeError('INTERNAL: a')]
)
def test_faults_of_the_program_keep_their_traceback(error):
  assert explain(error) is None


def test_long_messages_keep_their_ends():
  line = messages.one_line('--name=' + 10**5 * 'x' + ': the reason')
  assert line.startswith('--name=x')
  assert line.endswith('x: the reason')
  assert len(line) < 3000


def test_errors_of_the_operating_system_end_a_program_in_one_line():
  code, _, errors = launched('def run(): open("/nowhere/x")')
  assert code == 1
  assert errors == 'error: cannot use /nowhere/x: No such file or directory\n'


def test_a_reader_that_has_gone_is_no_error():
  read, write = os.pipe()
  os.close(read)
  program = (
    'from experiments.launch import launch\n'
    'launch(lambda: [print(i) for i in range(10**5)])'
  )
  done = subprocess.run(
    [sys.executable, '-c', program],
    cwd=ROOT,
    stdout=write,
    stderr=subprocess.PIPE,
    text=True,
    check=False,
  )
  os.close(write)
  assert (done.returncode, done.stderr) == (141, '')


WARNING = """
import sys, types, warnings
def module(name, text):
  made = types.ModuleType(name)
  exec(f'import warnings\\ndef warn(): warnings.warn({text!r}, stacklevel=2)',
       made.__dict__)
  return made
own = module('nemo_jax.data', 'three images\\nare left out')
other = module('elsewhere', 'of no interest')
def run():
  for _ in range(3):
    own.warn(); other.warn()
  # Filed under another package, by one of ours.
  exec('own.warn()', {'own': own, '__name__': 'contextlib'})
"""


def test_own_warnings_are_one_line_each_and_others_are_silent():
  code, _, errors = launched(WARNING)
  assert code == 0
  assert errors == 'warning: three images are left out\n'


@pytest.mark.parametrize(
  ('words', 'line'),
  [
    (['--wrkload=digits'], '--wrkload is no flag; did you mean --workload?'),
    (['--qqq'], '--qqq is no flag; --help shows all'),
    (['digits'], "'digits' is not a flag"),
    (['--cache'], 'Missing value for flag --cache'),
    (['--lowering=x\ny'], '--lowering=x y: value should be one of <'),
    (['--flagfile=none'], 'none'),
  ],
)
def test_flags_that_are_wrong_are_one_line(words, line):
  process = start('-m', 'experiments.workloads', *words)
  output, errors = process.communicate(timeout=60)
  assert process.returncode == 1
  assert not output
  assert errors.startswith('error: ')
  assert line in errors
  assert len(errors.splitlines()) == 1
