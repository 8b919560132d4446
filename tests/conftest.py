"""What several test files share."""

import pathlib

import pytest

from nemo_jax import workloads

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope='session')
def cache() -> pathlib.Path:
  """The folder of trained weights, the one that `make search` uses."""
  return ROOT / 'runs' / 'cache'


@pytest.fixture(scope='session')
def digits(cache) -> workloads.Workload:
  return workloads.load('digits', cache)
