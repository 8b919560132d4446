"""Start of every experiment: flags, signals, warnings and errors."""

import difflib
import inspect
import os
import sys
from collections.abc import Callable, Sequence

import jax
import scipy.linalg  # noqa: F401 (loads the BLAS that JAX calls)
import threadpoolctl
from absl import app, flags, logging

from experiments import messages, signals
from nemo_jax.core.types import InputError

FLAGS = flags.FLAGS


def explain(error: Exception) -> str | None:
  """Message on an error that a user can correct; None for other errors."""
  said = str(error).strip()
  if isinstance(error, InputError | NotImplementedError):
    return messages.one_line(said)
  if isinstance(error, MemoryError):
    return messages.one_line(f'out of memory: {said}').rstrip(': ')
  if isinstance(error, OSError):
    where = '' if error.filename is None else f'cannot use {error.filename}: '
    return messages.one_line(where + (error.strerror or said or repr(error)))
  if isinstance(error, jax.errors.JaxRuntimeError) and (
    'RESOURCE_EXHAUSTED' in said
  ):
    return messages.one_line(
      f'out of memory: {said.splitlines()[0][:300]}; --memory_gib and '
      '--batch_size limit what is used'
    )
  return None


def parse(argv: Sequence[str]) -> None:
  """Parses the flags; an error ends the process with one line."""
  try:
    _, *rest = FLAGS(argv)
  except flags.UnrecognizedFlagError as error:
    near = difflib.get_close_matches(error.flagname, list(FLAGS), 1)
    guess = f'did you mean --{near[0]}?' if near else '--help shows all'
    sys.exit(
      messages.one_line(f'error: --{error.flagname} is no flag; {guess}')
    )
  except flags.Error as error:
    said = str(error).removeprefix('flag ')
    sys.exit(messages.one_line(f'error: {said}'))
  except UnicodeError as error:
    sys.exit(messages.one_line(f'error: --flagfile: {error}'))
  if rest:
    sys.exit(messages.one_line(f'error: {rest[0]!r} is not a flag'))


def _introduce(module: str) -> None:
  """Makes --help show the docstring and the flags of a command's module.

  absl shows those of the main module. A command is the main module only if it
  is started by `python -m`.
  """
  if module == '__main__':
    return
  sys.modules['__main__'].__doc__ = sys.modules[module].__doc__
  for flag in FLAGS.get_key_flags_for_module(module):
    FLAGS.register_key_flag_for_module(sys.argv[0], flag)


def launch(run: Callable[[], None]) -> None:
  """Parses the flags and runs a command; errors of `explain` are one line.

  Args:
    run: the command, from the module whose flags and docstring --help shows.
  """

  def main(argv: Sequence[str] | None) -> None:
    del argv
    # orbax logs every step of every checkpoint, and warns of unfinished ones.
    logging.set_verbosity(logging.ERROR)
    # Threads of BLAS compete with those of XLA: with them, factoring a matrix
    # of 256 rows may take a hundred times as long.
    threadpoolctl.threadpool_limits(1, user_api='blas')
    run()

  _introduce(inspect.unwrap(run).__module__)
  signals.stop_on_signals()
  messages.show_own_warnings()
  if sys.stdout:
    # A signal leaves no time to flush, and some terminals lack characters.
    options = {'line_buffering': True, 'errors': 'backslashreplace'}
    getattr(sys.stdout, 'reconfigure')(**options)  # noqa: B009 (not of all)
  try:
    app.run(main, flags_parser=parse)
  except BrokenPipeError:
    # The reader of the output has ended; what is buffered is discarded.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(141)
  except Exception as error:
    if (line := explain(error)) is None:
      raise
    sys.exit(f'error: {line}')
