"""Checkpoints of many kinds are read as the same weights."""

import argparse
import warnings

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from nemo_jax import workloads
from nemo_jax.models import weights
from tests import torch_models
from tests.models.checkpoints import refused, same, saved

SHAPES = workloads.network('cifar10_resnet20').variables


@pytest.mark.parametrize('legacy', [False, True])
@pytest.mark.parametrize('wrap', [None, 'state_dict', 'model'])
def test_checkpoints_of_pytorch_are_read(
  tmp_path, state, tensors, wrap, legacy
):
  path = tmp_path / 'weights.pth'
  content = {f'module.{k}': v for k, v in state.items()} if wrap else state
  content = {wrap: content, 'epoch': 3} if wrap else content
  torch.save(content, path, _use_new_zipfile_serialization=not legacy)
  same(weights.read(path), tensors)


def test_safetensors_are_read(tmp_path, tensors):
  path = tmp_path / 'weights.safetensors'
  safetensors.numpy.save_file(tensors, path)
  same(weights.read(path), tensors)


def test_half_precision_becomes_float32(tmp_path, state):
  path = tmp_path / 'half.pth'
  torch.save({'a': state['linear.weight'].bfloat16()}, path)
  (value,) = weights.read(path).values()
  assert value.dtype == np.float32


def test_a_checkpoint_of_parameters_that_require_grad(tmp_path):
  model = torch_models.randomized(torch_models.CifarResNet())
  parameters = dict(model.named_parameters())
  assert all(x.requires_grad for x in parameters.values())
  found = weights.read(saved(tmp_path, {'state_dict': parameters}))
  same(found, {name: x.detach().numpy() for name, x in parameters.items()})
  words = 'lacks bn1.running_mean and ', 'statistics', 'state_dict()'
  refused(lambda: weights.convert(found, SHAPES), *words)


PREFIXES = ['module.', '_orig_mod.', 'model.', 'module._orig_mod.']
PREFIXES += ['_orig_mod.module.', 'model.module.', 'module.module.', 'net.']


@pytest.mark.parametrize('prefix', PREFIXES)
@pytest.mark.parametrize('kind', ['pth', 'safetensors'])
def test_prefixes_that_all_names_have_are_dropped(
  tmp_path, state, tensors, prefix, kind
):
  content = {prefix + name: x for name, x in state.items()}
  path = tmp_path / f'weights.{kind}'
  if kind == 'pth':
    torch.save(content, path)
  else:
    safetensors.torch.save_file(content, path)
  same(weights.read(path), tensors)


def test_a_prefix_that_some_names_lack_stays(tmp_path, state):
  content = {f'module.{name}': x for name, x in state.items()}
  content['head.weight'] = torch.ones(2)
  assert weights.read(saved(tmp_path, content)).keys() == content.keys()


@pytest.mark.parametrize('wraps', [1, 2])
def test_an_averaged_model_is_read(tmp_path, tensors, wraps):
  model = torch_models.randomized(torch_models.CifarResNet())
  average = torch.optim.swa_utils.AveragedModel(model)
  average.update_parameters(model)
  content = average.state_dict()
  assert 'n_averaged' in content
  if wraps == 2:
    content = {f'module.{name}': x for name, x in content.items()}
  found = weights.read(saved(tmp_path, content))
  same(found, {k: x.numpy() for k, x in model.state_dict().items()})


@pytest.mark.parametrize(
  ('entries', 'taken'),
  [
    (('state_dict', 'state_dict_ema'), 'state_dict_ema'),
    (('model', 'model_ema'), 'model_ema'),
    (('model', 'ema'), 'ema'),
    (('model', 'state_dict'), 'state_dict'),
    (('net', 'params_ema'), 'params_ema'),
  ],
)
def test_of_several_entries_a_warning_says_which_is_taken(
  tmp_path, state, tensors, entries, taken
):
  other = {name: 0 * x for name, x in state.items()}
  content = {x: state if x == taken else other for x in entries}
  path = saved(tmp_path, content | {'optimizer': {'state': {0: state}}})
  with pytest.warns(UserWarning, match=f'holds .*; {taken} is taken'):
    same(weights.read(path), tensors)


@pytest.mark.parametrize(
  ('wrap', 'left'),
  [
    (lambda x, y: {'model': x, 'ema_weights': y}, 'ema_weights'),
    (lambda x, y: {'state_dict': x, 'swa_model': {'module': y}}, 'swa_model'),
    (lambda x, y: {**y, 'ema': x}, 'tensors'),
    (
      lambda x, y: {'state_dict': x, 'shadow': {'params': list(y.values())}},
      'shadow',
    ),
    (
      lambda x, y: {'state_dict': x, 'callbacks': {'EMA': {'weights': y}}},
      'callbacks',
    ),
  ],
)
def test_weights_that_are_left_out_are_told(
  tmp_path, state, tensors, wrap, left
):
  path = saved(tmp_path, wrap(state, {n: 0 * x for n, x in state.items()}))
  with pytest.warns(UserWarning, match=f'{left}; .* is taken'):
    same(weights.read(path), tensors)


@pytest.mark.parametrize(
  'wrap',
  [
    lambda x: {'ema': {'module': x, 'decay': torch.tensor(0.9)}},
    lambda x: {'model': {'state_dict': x}, 'epoch': 3},
    lambda x: {'state_dict': x, 'best_acc1': torch.tensor(0.9)},
    lambda x: {'state_dict': x, 'state_dict_ema': None},
    lambda x: {'state_dict': x, 'ema': {'decay': torch.tensor(0.9)}},
    lambda x: {'model': x, 'args': argparse.Namespace(lr=0.1)},
    lambda x: {'model': x, 'best': np.float64(0.9), 'epoch': np.int64(3)},
    lambda x: {'network': x},
  ],
)
def test_the_only_entry_with_weights_is_taken(tmp_path, state, tensors, wrap):
  path = saved(tmp_path, wrap(state))
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    same(weights.read(path), tensors)


def test_entries_that_hold_themselves_end(tmp_path):
  content = {'epoch': 3}
  content['model'] = content
  refused(lambda: weights.read(saved(tmp_path, content)), 'no tensors by name')


@pytest.mark.parametrize('content', [{'a': {'b': torch.ones(3)}}, {0: 1}])
def test_unknown_entries_are_listed(tmp_path, content):
  path = saved(tmp_path, content)
  refused(lambda: weights.read(path), 'its entries are', repr(list(content)[0]))


def test_a_name_that_is_no_text_is_refused(tmp_path):
  path = saved(tmp_path, {0: torch.ones(3)})
  refused(lambda: weights.read(path), 'no tensors by name')


@pytest.mark.parametrize('name', ['A.PTH', 'a.bin', 'a', 'A.SAFETENSORS'])
@pytest.mark.parametrize('kind', ['torch', 'legacy', 'safetensors'])
def test_a_file_is_known_by_its_content(tmp_path, state, tensors, name, kind):
  path = tmp_path / name
  if kind == 'safetensors':
    safetensors.torch.save_file(state, path)
  else:
    torch.save(state, path, _use_new_zipfile_serialization=kind == 'torch')
  same(weights.read(path), tensors)


FLOATS = torch.float16, torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize('kind', ['pth', 'safetensors'])
@pytest.mark.parametrize('dtype', FLOATS)
def test_floats_become_float32(tmp_path, kind, dtype):
  values = torch.tensor([[1.5, -0.1, 3e-5, 0.0]]).to(dtype)
  path = tmp_path / f'a.{kind}'
  if kind == 'pth':
    torch.save({'a': values}, path)
  else:
    safetensors.torch.save_file({'a': values}, path)
  (found,) = weights.read(path).values()
  assert found.dtype == np.float32
  np.testing.assert_array_equal(found, values.float().numpy())
