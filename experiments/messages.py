"""Errors and warnings of experiments as single lines."""

import sys
import traceback
import warnings
from typing import TextIO

# Longer messages are cut in the middle: names come first, and reasons last.
_LONGEST = 2000


def one_line(text: str) -> str:
  """The text on one line, with control characters escaped."""
  text = ' '.join(text.split())
  if len(text) > _LONGEST:
    half = _LONGEST // 2
    text = f'{text[:half]} ... {text[-half:]}'
  return ''.join(
    c if c.isprintable() else c.encode('unicode_escape').decode() for c in text
  )


def _module_that_warns() -> str:
  """Name of the module that called `warnings.warn`, from the stack."""
  for frame, _ in traceback.walk_stack(None):
    name = frame.f_globals.get('__name__', '')
    if name not in (__name__, 'warnings', '_py_warnings'):
      return name
  return ''


def show_own_warnings() -> None:
  """Shows warnings of this package as single lines from now on, each once.

  Warnings of other packages are shown only with Python's option -W. The package
  is found from the stack, since `stacklevel` may attribute a warning to a
  caller in any module.
  """
  asked, seen = bool(sys.warnoptions), set()

  def show(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
  ) -> None:
    own = _module_that_warns().startswith(('nemo_jax', 'experiments'))
    text = one_line(f'warning: {message}')
    if text in seen or not (own or asked):
      return
    seen.add(text)
    # Imported with the first warning; it does not break progress bars.
    from tqdm import tqdm

    tqdm.write(text, file=sys.stderr)

  if not asked:
    warnings.simplefilter('always')
  setattr(warnings, 'showwarning', show)  # noqa: B010 (typed as a function)
