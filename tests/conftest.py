"""What several test files share."""

import fcntl
import pathlib

import hypothesis
import pytest

from nemo_jax import workloads

# A machine under load is no reason to fail.
hypothesis.settings.register_profile('tests', deadline=None)
hypothesis.settings.load_profile('tests')

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope='session')
def cache() -> pathlib.Path:
  """The folder of trained weights, the one that `make search` uses."""
  return ROOT / 'runs' / 'cache'


@pytest.fixture(scope='session')
def digits(cache) -> workloads.Workload:
  """The workload; of several test processes one trains, the others wait."""
  cache.mkdir(parents=True, exist_ok=True)
  with open(cache / '.lock', 'w') as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    return workloads.load('digits', cache)
