"""metrics.jsonl: what each generation of a run measured, a line for each.

Every line carries its digest. What is damaged is left out, with a warning: no
result depends on it.
"""

import json
import os
import pathlib
import warnings
from typing import Any, NamedTuple

from nemo_jax.core import files


class _Line(NamedTuple):
  text: str
  metrics: dict[str, Any]


def _path(workdir: str | os.PathLike) -> pathlib.Path:
  return files.local(workdir) / 'metrics.jsonl'


def append_metrics(workdir: str | os.PathLike, metrics: dict) -> None:
  """Adds a line.

  Raises:
    InputError: the operating system refuses, for a full disk for example.
  """
  plain = {name: files.plain(value) for name, value in metrics.items()}
  path = _path(workdir)
  with files.errors_named(path), open(path, 'a', encoding='utf-8') as file:
    file.write(json.dumps(files.seal(plain)) + '\n')


def _no_number(word: str):
  raise ValueError(f'{word} is no number')


def _parse(line: bytes) -> _Line | None:
  """The content of a line; None if it is damaged."""
  try:
    metrics = json.loads(line, parse_constant=_no_number)
  except (ValueError, RecursionError):
    return None
  if (
    not isinstance(metrics, dict) or type(metrics.get('generation')) is not int
  ):
    return None
  # Lines of older versions have no digest.
  if 'sha256' in metrics and not files.is_sealed(metrics):
    return None
  metrics.pop('sha256', None)
  return _Line(line.decode(), metrics)


def _read(workdir: str | os.PathLike) -> tuple[bytes, list[_Line]]:
  """What is in the file, and its lines; a warning says what is left out."""
  path = _path(workdir)
  if not path.exists():
    return b'', []
  with files.errors_named(path):
    content = path.read_bytes()
  found = [_parse(line) for line in content.split(b'\n') if line]
  lines = [line for line in found if line]
  if damaged := len(found) - len(lines):
    warnings.warn(
      f'{path} is damaged: of {len(found)} lines {damaged} left out',
      stacklevel=3,
    )
  return content, lines


def read_metrics(workdir: str | os.PathLike) -> list[dict]:
  """The metrics of all generations; damaged ones are left out."""
  return [line.metrics for line in _read(workdir)[1]]


def rewind_metrics(workdir: str | os.PathLike, generation: int) -> None:
  """Forgets the lines of later generations, which will be written again.

  Raises:
    InputError: the operating system refuses.
  """
  content, lines = _read(workdir)
  kept = [x.text for x in lines if x.metrics['generation'] <= generation]
  text = ''.join(f'{line}\n' for line in kept)
  if text.encode() != content:
    files.write_text(_path(workdir), text)
