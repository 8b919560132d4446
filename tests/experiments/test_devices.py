"""Searches on several devices and in several processes find one front."""

import json
import os
import re
import socket
import subprocess
import sys
import time

import pytest

from tests.conftest import CACHE, ROOT

# Numbers of devices, and of those that divide the images.
LAYOUTS = [(4, 2)]
MORE_LAYOUTS = [(8, 1), (2, 1), (2, 2), (4, 1), (4, 4), (8, 2), (8, 8)]
SMALL = (
  '--species=direct,gcn',
  '--population=10',
  '--calibration=min_max',
  '--lost_after=10',
  f'--cache={CACHE}',
)


def run_here(code: str, devices: int) -> str:
  """The output of a Python process that sees so many devices."""
  done = subprocess.run(
    [sys.executable, '-c', code],
    cwd=ROOT,
    env=os.environ | {'JAX_NUM_CPU_DEVICES': str(devices)},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


@pytest.mark.parametrize(
  'layouts', [LAYOUTS, pytest.param(MORE_LAYOUTS, marks=pytest.mark.slow)]
)
def test_the_same_seed_gives_the_same_front(layouts):
  """Neither 10 candidates nor 13 images can be divided by 4 or 8."""
  code = f'from tests import on_devices; on_devices.main({[(1, 1), *layouts]})'
  one, *others = json.loads(run_here(code, 8).splitlines()[-1])
  for other in others:
    assert other == one


def test_devices_that_the_images_cannot_share_are_refused():
  code = (
    'from nemo_jax import InputError\n'
    'from nemo_jax.core import devices\n'
    'try: devices.make_mesh(3)\n'
    'except InputError as error: print(error)\n'
    'print(list(devices.make_mesh(2).shape.items()))'
  )
  refused, shape = run_here(code, 4).splitlines()
  assert refused == 'image_devices is 3; it has to divide the 4 devices'
  assert shape == "[('candidate', 2), ('image', 2)]"


def test_half_a_description_of_the_processes_is_refused(tmp_path):
  done = subprocess.run(
    [
      *(sys.executable, '-m', 'experiments.search'),
      *(f'--workdir={tmp_path / "run"}', '--coordinator=localhost:1'),
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 1
  assert '--coordinator, --processes and --process_id go together' in (
    done.stderr
  )
  assert len(done.stderr.splitlines()) == 1


def start(workdir, generations, *flags, devices=2):
  command = [sys.executable, '-m', 'experiments.search', *SMALL, *flags]
  return subprocess.Popen(
    [*command, f'--workdir={workdir}', f'--generations={generations}'],
    cwd=ROOT,
    env=os.environ | {'JAX_NUM_CPU_DEVICES': str(devices)},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def start_two(workdirs, generations, *flags):
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  join = (f'--coordinator=127.0.0.1:{port}', '--processes=2', *flags)
  return [
    start(workdir, generations, *join, f'--process_id={i}')
    for i, workdir in enumerate(workdirs)
  ]


def finish(process) -> str:
  output, errors = process.communicate(timeout=600)
  assert process.returncode == 0, errors
  return output


@pytest.mark.slow
def test_two_processes_find_the_front_of_one_and_only_the_first_writes(
  tmp_path, digits
):
  del digits  # only makes sure that the weights are there
  finish(start(tmp_path / 'one', 4, devices=1))
  folders = [tmp_path / 'first', tmp_path / 'second']
  outputs = [
    finish(process) for process in start_two(folders, 4, '--image_devices=2')
  ]
  assert (folders[0] / 'front.json').read_bytes() == (
    (tmp_path / 'one' / 'front.json').read_bytes()
  )
  assert not folders[1].exists()
  assert 'points on the front' in outputs[0]
  # What is left are lines of the library that carries the messages, which its
  # threads may tear apart.
  own = re.sub(r'.*Gloo.*|.*peer ranks.*', '', outputs[1])
  assert not own.strip()


@pytest.mark.slow
def test_a_lost_process_is_reported_and_the_run_resumes_elsewhere(
  tmp_path, digits
):
  del digits
  generations = 60
  first, second = start_two([tmp_path] * 2, generations)
  stored = tmp_path / 'metrics.jsonl'
  while not (stored.exists() and stored.read_text().count('\n') > 3):
    assert first.poll() is None, first.communicate()[1]
    time.sleep(0.1)
  second.kill()
  _, errors = first.communicate(timeout=60)
  second.communicate()
  assert first.returncode == 1
  last = errors.strip().splitlines()[-1]
  assert last.startswith('error: process 0 of 2 lost another one')
  done = json.loads(stored.read_text().splitlines()[-1])['generation']

  assert done < generations
  output = finish(start(tmp_path, generations, devices=4))
  assert f'resuming after generation {done}' in output or (
    f'resuming after generation {done - 1}' in output
  )
  again = tmp_path / 'again'
  finish(start(again, generations, devices=1))
  resumed = json.loads((tmp_path / 'front.json').read_text())
  assert resumed == json.loads((again / 'front.json').read_text())
