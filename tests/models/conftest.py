"""Weights of a small network, as PyTorch's tensors and as arrays."""

import pytest

from tests import torch_models


@pytest.fixture(scope='session')
def state():
  model = torch_models.randomized(torch_models.CifarResNet())
  return {name: x.clone() for name, x in model.state_dict().items()}


@pytest.fixture(scope='session')
def tensors(state):
  return {name: x.numpy() for name, x in state.items()}
