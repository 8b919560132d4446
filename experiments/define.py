"""Kinds of flags that refuse, when they are parsed, what cannot be used.

A command reads the flags that it has defined from `own`.
"""

import contextlib
import math
import os
import re
import sys
import types
from collections.abc import Callable, Generator, Sequence
from typing import Any

from absl import flags

from nemo_jax.core import files
from nemo_jax.core.types import InputError

# Flags belong to the module that calls these functions.
flags.disclaim_key_flags()

# Seeds of JAX are the lowest 32 bits of what it is given.
SEEDS = (0, 2**32 - 1)
# What counts of evaluations and images hold, in int32.
LARGEST = 2**31 - 1
# The archive and what is sorted by rank stay small beside a network.
POPULATIONS = (2, 2**14)
_LONGEST_NAME = 255


class _Parser(flags.ArgumentParser):
  """The parser of absl that calls a function; defaults are values already."""

  def __init__(self, convert: Callable[[str], Any], kind: str):
    self._convert = convert
    self.syntactic_help = kind

  def parse(self, argument):
    """What the function makes of the text; ValueError if it is wrong."""
    return self._convert(argument) if isinstance(argument, str) else argument


def _whole(text: str, low: int, high: int) -> int:
  if not re.fullmatch('[+-]?[0-9]{1,20}', text):
    raise InputError(f'{text!r} is no whole number from {low} to {high}')
  if not low <= int(text) <= high:
    raise InputError(f'it has to be from {low} to {high}')
  return int(text)


def whole(
  name: str, default: int | None, help: str, low: int = 1, high: int = LARGEST
) -> None:
  """Defines a whole number from `low` to `high`."""
  parser = _Parser(
    lambda text: _whole(text, low, high), f'a whole number from {low} to {high}'
  )
  flags.DEFINE(parser, name, default, help)


def number(
  name: str, default: float | None, help: str, low: float, high: float
) -> None:
  """Defines a number from `low` to `high`, which may be infinite."""

  def convert(text):
    try:
      value = float(text) if text.isascii() else math.nan
    except ValueError:
      value = math.nan
    if not low <= value <= high:
      raise InputError(f'it has to be a number from {low:g} to {high:g}')
    return value

  parser = _Parser(convert, f'a number from {low:g} to {high:g}')
  flags.DEFINE(parser, name, default, help)


def _path(text: str) -> str:
  path = files.local(text)
  if any(len(os.fsencode(part)) > _LONGEST_NAME for part in path.parts):
    raise InputError(f'a name in it has over {_LONGEST_NAME} bytes')
  # Other paths are left as they were typed: runs compare them.
  return str(path) if text.startswith('~') else text


def path(name: str, default: str | None, help: str) -> None:
  """Defines a file or folder of a mounted file system; `~` is expanded."""
  flags.DEFINE(_Parser(_path, 'a path'), name, default, help)


def _known(word: str, choices: Sequence[str], of: str) -> str:
  if word not in choices:
    known = ', '.join(choices)
    raise InputError(f'unknown {of} {word!r}; the choices are {known}')
  return word


def plugin(name: str, default: str, help: str) -> None:
  """Defines the name of a plug-in; whether there is one is seen later."""

  def convert(text):
    if not text or not text.isprintable():
      raise InputError(f'{text!r} is no name')
    return text

  flags.DEFINE(_Parser(convert, 'a name'), name, default, help)


def words(
  name: str,
  default: Sequence[str],
  help: str,
  *,
  choices: Sequence[str] | None = None,
  of: str = 'word',
  numbers: tuple[int, int] | None = None,
  may_be_empty: bool = False,
) -> None:
  """Defines words between commas, each there once.

  Args:
    name: of the flag.
    default: its value if it is absent.
    help: what it is.
    choices: what there is to choose from; anything if absent.
    of: what a choice is called.
    numbers: the words are whole numbers from the first to the second.
    may_be_empty: whether there may be none.
  """

  def convert(text):
    found = [part.strip(' ') for part in text.split(',')] if text else []
    if not (found or may_be_empty):
      raise InputError(f'there are no {name}; give at least one')
    for part in found:
      if not part or not part.isprintable():
        raise InputError(f'{part!r} is no {of}')
      if choices is not None:
        _known(part, choices, of)
      if numbers:
        _whole(part, *numbers)
        # They name results, so that each has to be written in one way.
        if part != str(int(part)):
          raise InputError(f'{part!r} is written {int(part)}')
    if len(set(found)) < len(found):
      raise InputError('give each once')
    return found

  flags.DEFINE(
    _Parser(convert, 'words between commas'),
    name,
    list(default),
    help,
    serializer=flags.CsvListSerializer(','),
  )


@contextlib.contextmanager
def named(name: str) -> Generator[None]:
  """Puts the flag and its value before the message of an `InputError`."""
  try:
    yield
  except InputError as error:
    raise InputError(f'--{name}={shown(name)}: {error}') from error


def shown(name: str) -> str:
  """The value of a flag, in messages."""
  value = flags.FLAGS[name].value
  return ','.join(map(str, value)) if isinstance(value, list) else str(value)


def own(module: str) -> types.SimpleNamespace:
  """The flags that a module has defined, by name.

  Args:
    module: its `__name__`.
  """
  defined = flags.FLAGS.get_flags_for_module(sys.modules[module])
  return types.SimpleNamespace(**{flag.name: flag.value for flag in defined})


def present(name: str) -> bool:
  """Whether a flag was given."""
  return bool(flags.FLAGS[name].present)
