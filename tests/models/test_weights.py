"""Tensors of a checkpoint as variables of a network."""

import numpy as np
import pytest

from nemo_jax import workloads
from nemo_jax.core.types import InputError
from nemo_jax.models import weights
from tests import torch_models

SHAPES = workloads.network('cifar10_resnet20').variables


@pytest.fixture(scope='module')
def state():
  model = torch_models.randomized(torch_models.CifarResNet())
  return {name: x.clone() for name, x in model.state_dict().items()}


@pytest.fixture(scope='module')
def tensors(state):
  return {name: x.numpy() for name, x in state.items()}


def refused(call, *words):
  with pytest.raises(InputError) as caught:
    call()
  message = str(caught.value)
  assert '\n' not in message
  for word in words:
    assert word in message, message


def test_batch_norms_are_folded_in_double_precision(tensors):
  variables = weights.convert(tensors, SHAPES)['params']['bn1']
  get = lambda part: tensors[f'bn1.{part}'].astype(np.float64)
  scale = get('weight') / np.sqrt(get('running_var') + 1e-5)
  np.testing.assert_array_equal(variables['scale'], scale.astype(np.float32))
  bias = get('bias') - get('running_mean') * scale
  np.testing.assert_array_equal(variables['bias'], bias.astype(np.float32))


def without(tensors, name):
  return {k: v for k, v in tensors.items() if k != name}


@pytest.mark.parametrize(
  ('change', 'words'),
  [
    (lambda t: without(t, 'linear.bias'), ('lacks linear.bias',)),
    (lambda t: without(t, 'bn1.running_var'), ('lacks bn1.running_var',)),
    (lambda t: t | {'head.weight': t['linear.bias']}, ('has besides head',)),
    (
      lambda t: t | {'conv1.weight': t['conv1.weight'][:, :2]},
      ('conv1.weight', '(16, 2, 3, 3)', '(16, 3, 3, 3)'),
    ),
    (
      lambda t: t | {'conv1.weight': t['conv1.weight'] * np.nan},
      ('conv1.weight', 'not finite'),
    ),
    (lambda t: {}, ('lacks bn1.bias and 96 more',)),
  ],
)
def test_a_checkpoint_that_does_not_fit_names_the_tensor(
  tensors, change, words
):
  refused(lambda: weights.convert(change(tensors), SHAPES), *words)


def test_a_checkpoint_of_another_network_is_refused():
  model = torch_models.MobileNetV2()
  other = {name: x.numpy() for name, x in model.state_dict().items()}
  words = ('another network', 'lacks', 'has besides features.0.0.weight')
  refused(lambda: weights.convert(other, SHAPES), *words)


@pytest.mark.parametrize(
  ('change', 'words'),
  [
    (lambda x: (100 * x).astype(np.int8), ('holds int8, codes',)),
    (lambda x: (100 * x).astype(np.int32), ('holds int32, codes',)),
    (lambda x: x > 0, ('holds bool, codes',)),
    (lambda x: x * np.inf, ('not finite',)),
    (lambda x: x.ravel()[:1], ('has shape (1,)',)),
    (lambda x: x.ravel()[0], ('has shape ()',)),
  ],
)
def test_values_that_are_no_weights_are_refused(tensors, change, words):
  hurt = tensors | {'linear.weight': change(tensors['linear.weight'])}
  refused(lambda: weights.convert(hurt, SHAPES), 'linear.weight', *words)


def test_codes_with_scales_beside_them_are_refused(tensors):
  hurt = tensors | {
    'linear.weight': tensors['linear.weight'].astype(np.int8),
    'linear.SCB': np.ones(10, np.float32),
  }
  refused(lambda: weights.convert(hurt, SHAPES), 'linear.weight holds int8')


@pytest.mark.parametrize('value', [-1.0, -1e-6])
def test_a_variance_below_zero_is_refused(tensors, value):
  variance = tensors['layer1.0.bn2.running_var'].copy()
  variance[3] = value
  hurt = tensors | {'layer1.0.bn2.running_var': variance}
  words = 'layer1.0.bn2.running_var', 'variance below zero'
  refused(lambda: weights.convert(hurt, SHAPES), *words)


def test_a_batch_norm_that_overflows_is_refused(tensors):
  hurt = tensors | {
    'bn1.weight': np.full(16, 3e38, np.float32),
    'bn1.running_var': np.zeros(16, np.float32),
  }
  words = 'bn1: its folded bias is not finite'
  refused(lambda: weights.convert(hurt, SHAPES), words)
