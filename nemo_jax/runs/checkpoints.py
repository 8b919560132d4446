"""Checkpoints of a run: its last generations, stored by orbax.

A checkpoint that cannot be used is skipped, and the one before is restored.
"""

import contextlib
import errno
import logging
import os
import pathlib
import sys
import time
from collections.abc import Generator
from typing import Any

import jax
import orbax.checkpoint as ocp

from nemo_jax.core import files
from nemo_jax.core.types import InputError, PyTree, first_line

_KEPT = 3
# Part of the names of checkpoints that orbax is writing.
_UNFINISHED = '.orbax-checkpoint-tmp'
# Seconds after an error until the threads of orbax have ended.
_LATE = 0.2


def open_checkpoints(workdir: str | os.PathLike) -> ocp.CheckpointManager:
  """The manager of a run's checkpoints; it keeps the last three.

  Raises:
    InputError: the folder cannot be made.
  """
  folder = files.local(workdir).absolute() / 'checkpoints'
  with files.errors_named(folder):
    folder.mkdir(parents=True, exist_ok=True)
  me = jax.process_index()
  return ocp.CheckpointManager(
    folder,
    # Else orbax infers the items of all checkpoints from the newest folder.
    item_names=('leaves', 'digest'),
    options=ocp.CheckpointManagerOptions(
      max_to_keep=_KEPT,
      create=False,
      # Else the metadata of all checkpoints are read, and none may be damaged.
      lightweight_initialize=True,
      enable_async_checkpointing=False,
      # The process that stores does not synchronize with the others.
      multiprocessing_options=ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}
      ),
    ),
  )


@contextlib.contextmanager
def _unlogged() -> Generator[None]:
  """Context in which errors are raised, but not logged as well.

  orbax's threads log them with tracebacks. Callbacks of tensorstore then fail
  on an event loop that orbax has closed, which Python would print.
  """
  logger, hook = logging.getLogger('absl'), sys.unraisablehook
  level = logger.level

  def quiet(unraisable: Any) -> None:
    if str(unraisable.exc_value) != 'Event loop is closed':
      hook(unraisable)

  logger.setLevel(logging.CRITICAL)
  sys.unraisablehook = quiet
  try:
    yield
  except Exception:
    time.sleep(_LATE)
    raise
  finally:
    sys.unraisablehook = hook
    logger.setLevel(level)


def _by_system(error: BaseException | None) -> str | None:
  """Reason of the operating system, if it is the cause of an error; or None.

  orbax and tensorstore wrap an OSError: as a cause, or in a message.
  """
  while error is not None:
    if isinstance(error, OSError) and error.strerror:
      return error.strerror
    for code in errno.errorcode:
      if os.strerror(code) in str(error):
        return os.strerror(code)
    error = error.__cause__ or error.__context__
  return None


def save(
  checkpoints: ocp.CheckpointManager,
  generation: int,
  state: PyTree,
  run: str | None = None,
) -> None:
  """Stores a generation atomically: orbax renames it when it is complete.

  Args:
    checkpoints: from `open_checkpoints`.
    generation: its number.
    state: a pytree of arrays.
    run: digest of the run's flags and files, which is stored with the state.

  Raises:
    InputError: an error of the operating system, such as a full disk.
  """
  leaves = jax.tree.leaves(jax.device_get(state))
  content = {'sha256': files.digest(leaves), 'run': run}
  try:
    with _unlogged():
      checkpoints.save(
        generation,
        args=ocp.args.Composite(
          leaves=ocp.args.StandardSave(leaves),
          digest=ocp.args.JsonSave(content),
        ),
        force=True,  # also if a stray folder has a later number
      )
  except Exception as error:  # orbax and tensorstore raise many kinds
    folder = pathlib.Path(checkpoints.directory)
    _delete_unfinished(folder)
    if reason := _by_system(error):
      raise InputError(f'cannot use {folder}: {reason}') from error
    raise


def _delete_unfinished(folder: pathlib.Path) -> None:
  """Deletes checkpoints that orbax did not complete."""
  for path in folder.glob(f'*{_UNFINISHED}*'):
    files.delete(path)


def _read(
  checkpoints: ocp.CheckpointManager,
  generation: int,
  state: PyTree,
  run: str | None,
) -> PyTree:
  """A checkpoint in the structure of `state`; ValueError if it is unusable."""
  if (pathlib.Path(checkpoints.directory) / str(generation)).is_symlink():
    raise ValueError('it is a link')
  leaves, treedef = jax.tree.flatten(jax.device_get(state))
  try:
    with _unlogged():
      stored: Any = checkpoints.restore(
        generation,
        args=ocp.args.Composite(
          leaves=ocp.args.StandardRestore(leaves),
          digest=ocp.args.JsonRestore(),
        ),
      )
    content = dict(stored.digest)
  except Exception as error:  # orbax and tensorstore raise many kinds
    raise ValueError(first_line(error)) from error
  if files.digest(stored.leaves) != content.get('sha256'):
    raise ValueError('its content does not match its checksum')
  if run is not None and content.get('run') != run:
    raise ValueError('it is of a run with other flags or files')
  return jax.tree.unflatten(treedef, stored.leaves)


def restore(
  checkpoints: ocp.CheckpointManager, state: PyTree, run: str | None = None
) -> tuple[PyTree, list[str]]:
  """State of the last usable checkpoint, and messages on later ones.

  Args:
    checkpoints: from `open_checkpoints`.
    state: the state of a new run, with the structure and shapes; it is returned
      if there is no checkpoint.
    run: digest of the run's flags and files; checkpoints of other runs are
      unusable. None accepts all.

  Raises:
    InputError: there are checkpoints, and none can be used.
  """
  notes = []
  generations = sorted(set(checkpoints.all_steps()), reverse=True)
  for generation in generations:
    try:
      return _read(checkpoints, generation, state, run), notes
    except ValueError as error:
      notes.append(f'checkpoint {generation} is damaged ({error})')
  if generations:
    raise InputError(
      f'no readable checkpoint in {checkpoints.directory}: '
      f'{"; ".join(notes)}; delete the folder to start again'
    )
  return state, notes


def discard_after(checkpoints: ocp.CheckpointManager, generation: int) -> None:
  """Deletes the checkpoints of later generations, and unfinished ones.

  Run before generations are repeated, since later checkpoints are damaged or
  incomplete. Links are deleted, not followed.
  """
  folder = pathlib.Path(checkpoints.directory)
  numbered = lambda: (p for p in folder.iterdir() if p.name.isdecimal())
  with files.errors_named(folder):
    for path in numbered():
      if path.is_symlink() or not path.is_dir():
        files.delete(path)
    for later in checkpoints.all_steps():
      if later > generation or not (folder / str(later)).exists():
        checkpoints.delete(later)
    for path in numbered():
      if int(path.name) > generation:
        files.delete(path)
  _delete_unfinished(folder)
