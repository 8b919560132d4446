"""Files of weights, and what is asked of them."""

import numpy as np
import pytest
import torch

from nemo_jax.core.types import InputError


def refused(call, *words):
  with pytest.raises(InputError) as caught:
    call()
  message = str(caught.value)
  assert '\n' not in message
  for word in words:
    assert word in message, message


def same(one, other):
  assert one.keys() == other.keys()
  for name in one:
    np.testing.assert_array_equal(one[name], other[name])


def saved(tmp_path, content, name='weights.pth', **options):
  path = tmp_path / name
  torch.save(content, path, **options)
  return path
