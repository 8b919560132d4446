"""What several test files share."""

import contextlib
import fcntl
import os
import pathlib

import hypothesis
import pytest

ROOT = pathlib.Path(__file__).parent.parent
CACHE = ROOT / 'runs' / 'cache'
# BLAS's threads and XLA's get in each other's way.
os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')
# Programs are compiled once for all processes, those that tests start as well.
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(CACHE / 'xla'))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES', '-1')

import jax  # noqa: E402

from nemo_jax import data, workloads  # noqa: E402

# A machine under load is no reason to fail.
hypothesis.settings.register_profile('tests', deadline=None)
hypothesis.settings.load_profile('tests')

SHARED = ROOT.parent / 'shared' / 'data'


@contextlib.contextmanager
def alone(name: str):
  """Of several test processes one goes on, the others wait."""
  CACHE.mkdir(parents=True, exist_ok=True)
  with open(CACHE / f'.{name}.lock', 'w') as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    yield


@pytest.fixture(scope='module', autouse=True)
def few_programs():
  """Compiled programs of other files are dropped: Linux maps 65,530 pieces.

  Each program takes some, and a map that fails ends the process.
  """
  yield
  jax.clear_caches()


@pytest.fixture(scope='session')
def cache() -> pathlib.Path:
  """The folder of trained weights, the one that `make search` uses."""
  return CACHE


@pytest.fixture(scope='session')
def digits(cache) -> workloads.Workload:
  """The workload; one process trains."""
  with alone('digits'):
    return workloads.load('digits', cache)


@pytest.fixture(scope='session')
def shared() -> pathlib.Path:
  """The folder of real images and weights, which are no part of the project."""
  if not SHARED.is_dir():
    pytest.skip(f'needs real images and weights in {SHARED}')
  return SHARED


@pytest.fixture(scope='session')
def imagenet_tfds(shared, cache) -> pathlib.Path:
  """ImageNet's training images as TFDS's own builder prepares them."""
  with alone('tfds'):
    prepared = list((cache / 'tfds').glob('*/*/dataset_info.json'))
    if prepared:
      return prepared[0].parent
    pytest.importorskip('tensorflow')
    tars = str(shared / 'imagenet')
    return data.prepare('imagenet2012', str(cache / 'tfds'), tars)
