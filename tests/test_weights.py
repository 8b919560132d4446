"""Reading checkpoints: what is good, what is refused, and why."""

import functools
import hashlib
import http.server
import pickle
import threading

import numpy as np
import pytest
import safetensors.numpy
import torch

from nemo_jax import weights, workloads
from nemo_jax.base import InputError
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


# Downloads, from a server of our own.


@pytest.fixture
def server(tmp_path):
  """A folder, and the URL that it is served at."""
  folder = tmp_path / 'served'
  folder.mkdir()

  class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
      del args

  handler = functools.partial(Quiet, directory=folder)
  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as httpd:
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield folder, f'http://127.0.0.1:{httpd.server_address[1]}'
    httpd.shutdown()


def test_a_download_is_checked_and_kept(tmp_path, server):
  folder, url = server
  content = b'weights' * 1000
  name = f'net-{hashlib.sha256(content).hexdigest()[:8]}.pth'
  (folder / name).write_bytes(content)
  cache = tmp_path / 'cache'
  path = weights.download(f'{url}/{name}', cache)
  assert path == cache / name
  assert path.read_bytes() == content
  (folder / name).unlink()
  assert weights.download(f'{url}/{name}', cache) == path


def test_a_download_that_is_not_what_its_name_says_is_refused(tmp_path, server):
  folder, url = server
  (folder / 'net-01234567.pth').write_bytes(b'other')
  cache = tmp_path / 'cache'
  refused(
    lambda: weights.download(f'{url}/net-01234567.pth', cache),
    'SHA-256',
    '01234567',
  )
  assert not list(cache.iterdir())


def test_a_download_that_fails_names_the_address(tmp_path, server):
  _, url = server
  address = f'{url}/none-01234567.pth'
  refused(
    lambda: weights.download(address, tmp_path / 'c'), address, '--weights'
  )
  assert not list((tmp_path / 'c').iterdir())
