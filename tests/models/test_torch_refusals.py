"""Checkpoints that are damaged, dangerous or no weights: refused, and why."""

import pickle
import struct
import zipfile

import pytest
import safetensors.torch
import torch

from nemo_jax.models import weights
from tests.models.checkpoints import refused, saved


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
