"""Files that are written atomically and checked when they are read.

A file is written as a draft and renamed when it is complete: after a kill or on
a full disk there is either the old content or the new. Files of the package
hold the SHA-256 of their content, and reading refuses a file that differs.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import re
import shutil
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Container, Generator, Mapping
from typing import Any

import jax
import numpy as np

from nemo_jax.core.types import InputError, PyTree, first_line

# Ending of the names of drafts, which are beside the file or folder.
_DRAFT = '.draft'
# Age in seconds at which drafts without a lock are deleted.
_ABANDONED = 60.0
_DIGEST = 'sha256'
# Most bytes of a JSON file, which takes ten times as much memory when it is
# parsed; the front of a large network has some 10 MB.
_LARGEST_JSON = 2**28


class DamagedError(InputError):
  """The content of a file differs from what was written."""


def local(path: str | os.PathLike) -> pathlib.Path:
  """The path with `~` expanded.

  Raises:
    InputError: it is empty, has control characters, or is a URL such as
      `gs://bucket/folder`: files are on mounted file systems.
  """
  text = os.fspath(path)
  if not text:
    raise InputError('a path is empty')
  if any(ord(c) < 32 or ord(c) == 127 for c in text):
    raise InputError(f'the path {text!r} has control characters')
  # pathlib would make a folder named `gs:` of it, without the second slash.
  if scheme := re.match(r'([A-Za-z][A-Za-z0-9+.-]+):/', text):
    raise InputError(
      f'{text} is a URL; {scheme[1]} is not supported, name a folder of a '
      'mounted file system'
    )
  try:
    return pathlib.Path(text).expanduser()
  except RuntimeError as error:
    raise InputError(f'cannot expand {text}: {error}') from error


@contextlib.contextmanager
def errors_named(path: str | os.PathLike) -> Generator[None]:
  """Context that turns an `OSError` into an `InputError` with a path."""
  try:
    yield
  except OSError as error:
    where = error.filename if isinstance(error.filename, str) else path
    # The user does not know the name of the draft.
    where = path if str(where).endswith(_DRAFT) else where
    reason = error.strerror or str(error) or type(error).__name__
    raise InputError(f'cannot use {where}: {reason}') from error


def delete(path: pathlib.Path) -> None:
  """Deletes a file, a folder and its content, or a link; ignores errors."""
  if path.is_dir() and not path.is_symlink():
    shutil.rmtree(path, ignore_errors=True)
  else:
    with contextlib.suppress(OSError):
      path.unlink()


def _sweep(folder: pathlib.Path) -> None:
  """Deletes the drafts of processes that were killed."""
  for path in folder.glob(f'.*{_DRAFT}'):
    with contextlib.suppress(OSError):
      if time.time() - path.stat().st_mtime < _ABANDONED:
        continue
      handle = os.open(path, os.O_RDONLY)
      try:
        # The writer of a draft holds its lock, which ends with the process.
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        delete(path)
      finally:
        os.close(handle)


@contextlib.contextmanager
def draft(
  path: str | os.PathLike, folder: bool = False
) -> Generator[pathlib.Path]:
  """Context with a draft that becomes the file, or the folder, at its end.

  If anything fails, the draft is deleted and the old file stays. A folder that
  exists by then is not replaced, for another process has written it: the draft
  is deleted.

  Args:
    path: of the file or folder; parent folders are made.
    folder: whether the draft is a folder.

  Raises:
    InputError: an error of the operating system, such as a full disk.
  """
  path = local(path)
  with errors_named(path.parent), contextlib.ExitStack() as stack:
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path.parent)
    prefix, where = f'.{path.name}.', os.fspath(path.parent)
    if folder:
      name = tempfile.mkdtemp(suffix=_DRAFT, prefix=prefix, dir=where)
      handle = os.open(name, os.O_RDONLY)
    else:
      handle, name = tempfile.mkstemp(suffix=_DRAFT, prefix=prefix, dir=where)
    made = pathlib.Path(name)
    stack.callback(delete, made)
    stack.callback(os.close, handle)
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    yield made
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(made, (0o777 if folder else 0o666) & ~mask)
    if not folder:
      os.fsync(handle)
      os.replace(made, path)
      return
    try:
      made.rename(path)
    except OSError:
      if not path.is_dir():
        raise


def write_text(path: str | os.PathLike, text: str) -> None:
  """Writes a text file atomically, in UTF-8."""
  with draft(path) as made:
    made.write_text(text, encoding='utf-8')


def digest(tree: PyTree) -> str:
  """SHA-256 of the shapes, types and bytes of a pytree's leaves, in hex."""
  sha = hashlib.sha256()
  for leaf in jax.tree.leaves(tree):
    array = np.asarray(leaf)
    sha.update(f'{array.shape}{array.dtype}'.encode())
    sha.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
  return sha.hexdigest()


def _digest_of_names(arrays: Mapping[str, np.ndarray]) -> str:
  """SHA-256 of arrays and their names, in hex."""
  names = json.dumps(sorted(arrays))
  parts = [arrays[name] for name in sorted(arrays)]
  return digest([np.frombuffer(names.encode(), np.uint8), *parts])


def _save(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
  """Writes arrays and their digest as an .npz."""
  seal = np.frombuffer(bytes.fromhex(_digest_of_names(arrays)), np.uint8)
  with open(path, 'wb') as file:
    np.savez(file, allow_pickle=False, **arrays, **{_DIGEST: seal})


def write_arrays(
  path: str | os.PathLike, arrays: Mapping[str, np.ndarray]
) -> None:
  """Writes arrays by name, and their digest, as an .npz, atomically."""
  with draft(path) as made:
    _save(made, {name: np.asarray(x) for name, x in arrays.items()})


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
  """An array of an .npz; ValueError if the member is not a plain array."""
  with archive.open(info) as file:
    version = np.lib.format.read_magic(file)
    readers = {
      (1, 0): np.lib.format.read_array_header_1_0,
      (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
      raise ValueError(f'{info.filename} is of an unknown version')
    shape, _, dtype = readers[version](file)
    # Checked before anything is allocated: a header may claim any size.
    size = int(np.prod([int(n) for n in shape], dtype=object)) * dtype.itemsize
    if dtype.hasobject or min(shape, default=0) < 0:
      raise ValueError(f'{info.filename} holds objects, not numbers')
    if size != info.file_size - file.tell():
      raise ValueError(f'{info.filename} is not as long as its header says')
  with archive.open(info) as file:
    return np.lib.format.read_array(file, allow_pickle=False)


def read_npz(
  path: str | os.PathLike, names: Container[str] | None = None
) -> dict[str, np.ndarray]:
  """Arrays of an .npz by name, from any source; executes no code.

  Args:
    path: of the file.
    names: of the arrays that are read; all if None.

  Raises:
    DamagedError: the file is no .npz, or is damaged.
    InputError: an error of the operating system.
  """
  path = local(path)
  with contextlib.ExitStack() as stack:
    with errors_named(path):
      file = stack.enter_context(open(path, 'rb'))
    try:
      archive = zipfile.ZipFile(file)
      members = {
        info.filename.removesuffix('.npy'): info for info in archive.infolist()
      }
      return {
        name: _member(archive, info)
        for name, info in members.items()
        if names is None or name in names
      }
    except Exception as error:  # zipfile, zlib and NumPy raise many kinds
      raise DamagedError(f'{path} is damaged: {first_line(error)}') from error


def read_arrays(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """The arrays that `write_arrays` wrote, by name.

  Raises:
    DamagedError: the content differs from what was written.
    InputError: an error of the operating system.
  """
  arrays = read_npz(path)
  seal = arrays.pop(_DIGEST, None)
  if seal is None or seal.tobytes().hex() != _digest_of_names(arrays):
    raise DamagedError(f'{path} is damaged: its digest does not match')
  return arrays


def cached(
  path: str | os.PathLike,
  make: Callable[[], Mapping[str, np.ndarray]],
  parse: Callable[[dict[str, np.ndarray]], Any] = lambda arrays: arrays,
) -> Any:
  """The parsed arrays of a cache file, which is written if it is absent.

  A damaged file is written again, with a warning.

  Args:
    path: of the file.
    make: computes the arrays, by name.
    parse: from the arrays to what is returned; a file for which it raises
      `InputError` counts as damaged.

  Raises:
    InputError: an error of the operating system.
  """
  path = local(path)
  if path.exists():
    try:
      return parse(read_arrays(path))
    except InputError as error:
      reason = error if isinstance(error, DamagedError) else f'{path}: {error}'
      warnings.warn(f'{reason}; it is made again', stacklevel=2)
  writes = jax.process_index() == 0
  with contextlib.ExitStack() as stack:
    # Before the work, so that a folder that cannot be written fails at once.
    made = stack.enter_context(draft(path)) if writes else None
    arrays = {name: np.asarray(x) for name, x in make().items()}
    if made is not None:
      _save(made, arrays)
  return parse(arrays)


def plain(value: Any) -> Any:
  """Arrays as nested lists of numbers for JSON; None for not finite ones."""
  array = np.asarray(value)
  if array.ndim:
    return [plain(x) for x in array]
  number = array.item()
  return number if np.isfinite(number) else None


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
  """The content, of JSON's types, with its digest under `sha256`."""
  content = {name: x for name, x in content.items() if name != _DIGEST}
  text = json.dumps(content, sort_keys=True)
  return content | {_DIGEST: hashlib.sha256(text.encode()).hexdigest()}


def is_sealed(content: Mapping[str, Any]) -> bool:
  """Whether the digest in a content from `seal` matches it."""
  return dict(content) == seal(content)


def write_json(
  path: str | os.PathLike, content: Mapping[str, Any], indent: int | None = None
) -> None:
  """Writes a JSON object with its digest, atomically; arrays by `plain`."""
  content = json.loads(json.dumps(content, default=plain))
  write_text(path, json.dumps(seal(content), indent=indent) + '\n')


def read_json(path: str | os.PathLike) -> dict[str, Any]:
  """The object in a JSON file; its digest is not checked.

  Raises:
    DamagedError: the file holds no JSON object.
    InputError: an error of the operating system.
  """
  path = local(path)
  with errors_named(path):
    try:
      with open(path, 'rb') as file:
        text = file.read(_LARGEST_JSON + 1)
      if len(text) > _LARGEST_JSON:
        raise ValueError(f'it has over {_LARGEST_JSON} bytes')
      content = json.loads(text)
      if not isinstance(content, dict):
        raise ValueError('it holds no object')
    # Deeply nested brackets raise RecursionError.
    except (ValueError, RecursionError) as error:
      raise DamagedError(f'{path} is damaged: {first_line(error)}') from error
  return content
