"""How many images fit, and the same result for any number of them."""

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pytest

from nemo_jax.core import memory
from nemo_jax.core.memory import in_chunks
from nemo_jax.core.types import InputError
from nemo_jax.search.evaluate import candidates_at_once


class Device:
  def __init__(self, platform, stats):
    self.platform, self.memory_stats = platform, lambda: stats


def test_a_device_is_asked():
  gpu = Device('gpu', {'bytes_limit': 1000, 'bytes_in_use': 5})
  assert memory.total(gpu) == 1000
  assert 0 < memory.total() <= psutil.virtual_memory().total


def test_a_device_that_does_not_say_is_refused():
  for stats in (None, {}):
    with pytest.raises(InputError, match='does not say how much memory'):
      memory.total(Device('npu', stats))


def test_images_follow_the_budget():
  assert memory.images_at_once(100, budget=100_000) == 500
  assert memory.images_at_once(100, budget=100_000, candidates=5) == 100
  assert memory.images_at_once(10**9, budget=1000) == 1
  unsaid = memory.images_at_once(10**6)
  assert 1 < unsaid <= memory.CPU_BYTES / 10**6


@pytest.mark.parametrize('count', [1, 2, 3, 10, 11])
@pytest.mark.parametrize('chunk', [1, 2, 3, 4, 100])
def test_chunks_give_what_all_at_once_gives(count, chunk):
  images = jnp.arange(count * 6, dtype=jnp.float32).reshape(count, 2, 3)
  apply = lambda x: jnp.sum(x, axis=1) + x[:, 0]
  seen = []

  def noted(x):
    seen.append(len(x))
    return apply(x)

  out = jax.jit(lambda x: in_chunks(noted, x, chunk))(images)
  np.testing.assert_array_equal(out, apply(images))
  assert max(seen) <= chunk


@pytest.mark.parametrize('count', [1, 5, 8])
def test_every_array_of_a_tree_is_cut_into_the_same_chunks(count):
  inputs = {
    'words': jnp.arange(count * 3).reshape(count, 3),
    'rest': (jnp.linspace(0, 1, count), None),
  }
  apply = lambda x: x['words'] * x['rest'][0][:, None]
  out = jax.jit(lambda x: in_chunks(apply, x, 3))(inputs)
  np.testing.assert_array_equal(out, apply(inputs))


def test_small_networks_are_evaluated_together_on_accelerators(monkeypatch):
  assert candidates_at_once(10) is None
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  assert candidates_at_once(40_551_040 * 1000) == 16  # ResNet-20
  assert candidates_at_once(4_089_184_256 * 1000) is None  # ResNet-50
