"""Reading checkpoints: what is good, what is refused, and why."""

import argparse
import pickle
import struct
import warnings
import zipfile

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

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


def same(one, other):
  assert one.keys() == other.keys()
  for name in one:
    np.testing.assert_array_equal(one[name], other[name])


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


class Evil:
  """Unpickled by anything careless, it leaves a mark."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return open, (str(self.path), 'w')


@pytest.mark.parametrize('legacy', [False, True])
def test_a_file_that_would_execute_code_is_refused(tmp_path, state, legacy):
  mark, path = tmp_path / 'mark', tmp_path / 'evil.pth'
  content = {**state, 'extra': Evil(mark)}
  torch.save(content, path, _use_new_zipfile_serialization=not legacy)
  refused(lambda: weights.read(path), 'evil.pth', 'no checkpoint of weights')
  assert not mark.exists()


def test_a_plain_pickle_that_would_execute_code_is_refused(tmp_path):
  mark, path = tmp_path / 'mark', tmp_path / 'evil.th'
  path.write_bytes(pickle.dumps(Evil(mark)))
  refused(lambda: weights.read(path), 'evil.th')
  assert not mark.exists()


@pytest.mark.parametrize('name', ['a.pth', 'a.safetensors'])
@pytest.mark.parametrize('content', [b'', b'nonsense' * 99])
def test_files_that_are_no_checkpoint_are_refused(tmp_path, name, content):
  path = tmp_path / name
  path.write_bytes(content)
  refused(lambda: weights.read(path), name)


def test_a_cut_checkpoint_is_refused(tmp_path, state):
  path = tmp_path / 'cut.pth'
  torch.save(state, path)
  path.write_bytes(path.read_bytes()[:-5000])
  refused(lambda: weights.read(path), 'cut.pth')


def test_a_file_that_is_not_there_is_named(tmp_path):
  refused(lambda: weights.read(tmp_path / 'none.pth'), 'there is no file')
  refused(lambda: weights.read(tmp_path), 'there is no file')


def test_content_that_is_no_tensor_is_named(tmp_path):
  path = tmp_path / 'odd.pth'
  torch.save({'a': torch.ones(1), 'b': 3}, path)
  refused(lambda: weights.read(path), 'b is a int')
  torch.save([torch.ones(1)], path)
  refused(lambda: weights.read(path), 'holds no tensors by name')


def test_without_pytorch_the_line_says_how_to_get_it(tmp_path, monkeypatch):
  path = tmp_path / 'a.pth'
  path.write_bytes(b'')
  monkeypatch.setitem(__import__('sys').modules, 'torch', None)
  refused(lambda: weights.read(path), 'nemo_jax[torch]', 'safetensors')


def saved(tmp_path, content, name='weights.pth', **options):
  path = tmp_path / name
  torch.save(content, path, **options)
  return path


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


def quantized(scheme):
  values = torch.linspace(-1, 1, 12).reshape(3, 4)
  if scheme == 'tensor':
    return torch.quantize_per_tensor(values, 0.1, 0, torch.qint8)
  scales, zeros = torch.full((3,), 0.1), torch.zeros(3)
  return torch.quantize_per_channel(values, scales, zeros, 0, torch.qint8)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize(
  ('tensor', 'word'),
  [
    (lambda: quantized('tensor'), 'quantized'),
    (lambda: quantized('channel'), 'quantized'),
    (lambda: torch.eye(3).to_sparse(), 'sparse'),
    (lambda: torch.eye(3).to_sparse_csr(), 'sparse'),
    (lambda: torch.ones(3, device='meta'), 'without values'),
    (lambda: torch.ones(3, dtype=torch.complex64), 'complex64'),
    (lambda: torch.ones(3).to(torch.float8_e4m3fn), 'float8'),
    (lambda: torch.ones(3).to(torch.float8_e5m2), 'float8'),
  ],
)
def test_tensors_without_float_values_are_refused(tmp_path, tensor, word):
  path = saved(tmp_path, {'a.bias': torch.ones(3), 'a.weight': tensor()})
  refused(lambda: weights.read(path), 'weights.pth: a.weight is', word)


@pytest.mark.parametrize('dtype', [torch.float8_e4m3fn, torch.complex64])
def test_safetensors_without_float_values_are_refused(tmp_path, dtype):
  path = tmp_path / 'a.safetensors'
  safetensors.torch.save_file({'a.weight': torch.ones(3).to(dtype)}, path)
  refused(lambda: weights.read(path), 'a.safetensors: a.weight is of')


def test_what_a_refused_file_would_call_is_named(tmp_path):
  path = saved(tmp_path, {'a': torch.ones(1), 'b': Evil(tmp_path / 'mark')})
  refused(lambda: weights.read(path), 'it would call io.open')


@pytest.mark.parametrize('place', range(0, 100, 9))
def test_a_changed_byte_of_the_weights_is_noticed(tmp_path, state, place):
  path = saved(tmp_path, state)
  content = bytearray(path.read_bytes())
  with zipfile.ZipFile(path) as archive:
    members = [x for x in archive.infolist() if '/data/' in x.filename]
  start = members[place % len(members)].header_offset
  names = struct.unpack('<HH', content[start + 26 : start + 30])
  content[start + 30 + sum(names)] ^= 1
  path.write_bytes(content)
  refused(lambda: weights.read(path), 'weights.pth is damaged', 'differs')


@pytest.mark.parametrize(
  'content', [b'<html>' * 99, b'version https://git-lfs.github.com/spec/v1\n']
)
def test_nobody_is_told_to_load_what_is_refused(tmp_path, content):
  path = tmp_path / 'a.pth'
  path.write_bytes(content)
  refused(lambda: weights.read(path), 'PyTorch cannot read it; known are')
