"""Definitions of flags whose values are checked when they are parsed.

`own` returns the values of the flags that a module has defined.
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

# JAX takes the lowest 32 bits of a seed.
SEEDS = (0, 2**32 - 1)
# Largest number of evaluations or images, which are counted in int32.
LARGEST = 2**31 - 1
# Sizes of a population, for which the arrays of a search stay small.
POPULATIONS = (2, 2**14)
_LONGEST_NAME = 255


class _Parser(flags.ArgumentParser):
  """Parser of absl that calls a function; default values are not parsed."""

  def __init__(self, convert: Callable[[str], Any], kind: str):
    self._convert = convert
    self.syntactic_help = kind

  def parse(self, argument: Any) -> Any:
    """The value of a text; ValueError if it cannot be used."""
    return self._convert(argument) if isinstance(argument, str) else argument


def _whole(text: str, low: int, high: int) -> int:
  """The whole number that a text is; `InputError` outside of the limits."""
  if not re.fullmatch('[+-]?[0-9]{1,20}', text):
    raise InputError(f'{text!r} is no whole number from {low} to {high}')
  if not low <= int(text) <= high:
    raise InputError(f'it has to be from {low} to {high}')
  return int(text)


def whole(
  name: str, default: int | None, help: str, low: int = 1, high: int = LARGEST
) -> None:
  """Defines a flag for a whole number from `low` to `high`."""
  parser = _Parser(
    lambda text: _whole(text, low, high), f'a whole number from {low} to {high}'
  )
  flags.DEFINE(parser, name, default, help)


def number(
  name: str, default: float | None, help: str, low: float, high: float
) -> None:
  """Defines a flag for a number from `low` to `high`, which may be infinite."""

  def convert(text: str) -> float:
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
  """The path that a text is; `InputError` if it cannot be used."""
  path = files.local(text)
  if any(len(os.fsencode(part)) > _LONGEST_NAME for part in path.parts):
    raise InputError(f'a name in it has over {_LONGEST_NAME} bytes')
  # Other paths stay as they were typed: `check_flags` compares them.
  return str(path) if text.startswith('~') else text


def path(name: str, default: str | None, help: str) -> None:
  """Defines a flag for a file or folder; `~` is expanded, URLs are refused."""
  flags.DEFINE(_Parser(_path, 'a path'), name, default, help)


def _known(word: str, choices: Sequence[str], of: str) -> str:
  """The word; `InputError` if it is none of the choices."""
  if word not in choices:
    known = ', '.join(choices)
    raise InputError(f'unknown {of} {word!r}; the choices are {known}')
  return word


def plugin(name: str, default: str, help: str) -> None:
  """Defines a flag for the name of a plug-in, which is not looked up yet."""

  def convert(text: str) -> str:
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
  """Defines a flag for words separated by commas, without repetitions.

  Args:
    name: of the flag.
    default: value of an absent flag.
    help: description of the flag.
    choices: the words that are allowed; any if None.
    of: what a word is, for messages.
    numbers: limits of the words, if they have to be whole numbers.
    may_be_empty: whether the list may be empty.
  """

  def convert(text: str) -> list[str]:
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
        # The words name results, so a number has only one spelling.
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
  """Context that puts a flag and its value in front of `InputError`s."""
  try:
    yield
  except InputError as error:
    raise InputError(f'--{name}={shown(name)}: {error}') from error


def shown(name: str) -> str:
  """The value of a flag as text, for messages."""
  value = flags.FLAGS[name].value
  return ','.join(map(str, value)) if isinstance(value, list) else str(value)


def own(module: str) -> types.SimpleNamespace:
  """Values of the flags that a module has defined, as attributes.

  Args:
    module: its `__name__`.
  """
  defined = flags.FLAGS.get_flags_for_module(sys.modules[module])
  return types.SimpleNamespace(**{flag.name: flag.value for flag in defined})


def present(name: str) -> bool:
  """Whether a flag was given on the command line."""
  return bool(flags.FLAGS[name].present)
