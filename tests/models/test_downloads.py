"""Downloads, from a server of our own."""

import functools
import hashlib
import http.server
import threading

import pytest

from nemo_jax.core.types import InputError
from nemo_jax.models import weights


def refused(call, *words):
  with pytest.raises(InputError) as caught:
    call()
  message = str(caught.value)
  assert '\n' not in message
  for word in words:
    assert word in message, message


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


def test_a_kept_file_that_differs_is_downloaded_again(tmp_path, server):
  folder, url = server
  content = b'weights' * 1000
  name = f'net-{hashlib.sha256(content).hexdigest()[:8]}.pth'
  (folder / name).write_bytes(content)
  cache = tmp_path / 'cache'
  path = weights.download(f'{url}/{name}', cache)
  for damage in (content[:-1], b'', content[:-1] + b'S'):
    path.write_bytes(damage)
    with pytest.warns(UserWarning, match='is damaged; it is downl'):
      assert weights.download(f'{url}/{name}', cache) == path
    assert path.read_bytes() == content
    assert [x.name for x in cache.iterdir()] == [name]


@pytest.mark.filterwarnings('ignore:.*is damaged')
def test_a_kept_file_that_differs_is_never_handed_back(tmp_path, server):
  _, url = server
  (tmp_path / 'net-01234567.pth').write_bytes(b'damaged')
  address = f'{url}/net-01234567.pth'
  refused(lambda: weights.download(address, tmp_path), 'cannot download')


@pytest.mark.parametrize('name', ['net.pth', 'net-.pth', 'net-abc.pth', ''])
def test_a_name_without_a_hash_is_refused(tmp_path, name):
  address = f'http://127.0.0.1/{name}'
  words = address, 'does not end in the digits of a hash'
  refused(lambda: weights.download(address, tmp_path), *words)
