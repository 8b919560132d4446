"""Downloads that are checked against the hash in their name."""

import hashlib
import http.client
import os
import pathlib
import re
import urllib.request
import warnings
from collections.abc import Iterator

import tqdm

from nemo_jax.core import files
from nemo_jax.core.types import InputError


def _blocks(url: str, name: str) -> Iterator[bytes]:
  """Yields the content at a URL in blocks of up to 1 MiB.

  Raises:
    InputError: the download fails.
  """
  try:
    with (
      urllib.request.urlopen(url, timeout=30) as response,
      tqdm.tqdm(
        total=int(response.headers.get('Content-Length') or 0) or None,
        desc=f'downloading {name}',
        unit='B',
        unit_scale=True,
        disable=None,
      ) as bar,
    ):
      while block := response.read(1 << 20):
        yield block
        bar.update(len(block))
  except (OSError, ValueError, http.client.HTTPException) as error:
    raise InputError(
      f'cannot download {url}: {error}; fetch it elsewhere and name the '
      'file with --weights'
    ) from error


def _sha256(path: pathlib.Path) -> str:
  """SHA-256 of a file, in hex."""
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def download(url: str, folder: str | os.PathLike) -> pathlib.Path:
  """Path of the file at a URL, downloaded into a folder if it is not there.

  The name ends in `-` and the first digits of the SHA-256, as in torchvision.
  A file that is there is checked too, and downloaded again if it differs.

  Raises:
    InputError: the download fails, or its SHA-256 is not that of the name.
  """
  name = url.rpartition('/')[2]
  path = files.local(folder) / name
  digits = re.search(r'-([0-9a-f]{8,64})\.\w+$', name)
  if not digits:
    raise InputError(f'{url} does not end in the digits of a hash')
  digits = digits[1]
  with files.errors_named(path):
    if path.exists():
      if _sha256(path).startswith(digits):
        return path
      warnings.warn(f'{path} is damaged; it is downloaded again', stacklevel=2)
    with files.draft(path) as draft:
      with open(draft, 'wb') as file:
        for block in _blocks(url, name):
          file.write(block)
      found = _sha256(draft)
      if not found.startswith(digits):
        raise InputError(
          f'what came from {url} has SHA-256 {found[:16]}..., its name says '
          f'{digits}'
        )
  return path
