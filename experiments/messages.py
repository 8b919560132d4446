"""What experiments say of errors and warnings: single lines."""

import sys
import traceback
import warnings

# Longer messages lose their middle: names come first, and reasons last.
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
  """The name of the module that called `warnings.warn`."""
  for frame, _ in traceback.walk_stack(None):
    name = frame.f_globals.get('__name__', '')
    if name not in (__name__, 'warnings', '_py_warnings'):
      return name
  return ''


def show_own_warnings() -> None:
  """From now on warnings of this package are single lines, each shown once.

  Those of other packages are shown where Python's -W asks for them. Which
  package warns is read from the stack: the module that a warning is filed
  under is a caller of it, and may be any.
  """
  asked, seen = bool(sys.warnoptions), set()

  def show(message, category, filename, lineno, file=None, line=None):
    own = _module_that_warns().startswith(('nemo_jax', 'experiments'))
    text = one_line(f'warning: {message}')
    if text in seen or not (own or asked):
      return
    seen.add(text)
    # Loaded with the first warning; it keeps progress bars whole.
    from tqdm import tqdm

    tqdm.write(text, file=sys.stderr)

  if not asked:
    warnings.simplefilter('always')
  setattr(warnings, 'showwarning', show)  # noqa: B010 (has other names)
