"""metrics.jsonl, which has a line with the metrics of each generation.

Every line holds its digest. Damaged lines are left out, with a warning: no
result depends on them.
"""

import json
import os
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

from nemo_jax.core import files


class _Line(NamedTuple):
  """A valid line, as text and parsed."""

  text: str
  metrics: dict[str, Any]


def _path(workdir: str | os.PathLike) -> pathlib.Path:
  """Path of the file in a run's folder."""
  return files.local(workdir) / 'metrics.jsonl'


def append_metrics(
  workdir: str | os.PathLike, metrics: Mapping[str, Any]
) -> None:
  """Adds a line to the file.

  Args:
    workdir: the run's folder.
    metrics: numbers and arrays by name, with `generation`.

  Raises:
    InputError: an error of the operating system, such as a full disk.
  """
  plain = {name: files.plain(value) for name, value in metrics.items()}
  path = _path(workdir)
  with files.errors_named(path), open(path, 'a', encoding='utf-8') as file:
    file.write(json.dumps(files.seal(plain)) + '\n')


def _no_number(word: str) -> NoReturn:
  """Raises ValueError for NaN and infinities, which are no JSON."""
  raise ValueError(f'{word} is no number')


def _parse(line: bytes) -> _Line | None:
  """The line with its content; None if it is damaged."""
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
  """Content of the file and its valid lines; warns of damaged ones."""
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


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, Any]]:
  """The metrics of all generations, without damaged lines."""
  return [line.metrics for line in _read(workdir)[1]]


def rewind_metrics(workdir: str | os.PathLike, generation: int) -> None:
  """Deletes the lines of later generations, and damaged lines.

  Args:
    workdir: the run's folder.
    generation: the last whose line is kept.

  Raises:
    InputError: an error of the operating system.
  """
  content, lines = _read(workdir)
  kept = [x.text for x in lines if x.metrics['generation'] <= generation]
  text = ''.join(f'{line}\n' for line in kept)
  if text.encode() != content:
    files.write_text(_path(workdir), text)
