"""The checkpoints of a run: the last generations, by orbax.

One that cannot be used, whatever became of it, is passed over: those before it
stay readable.
"""

import contextlib
import errno
import logging
import os
import pathlib
import sys
import time
from collections.abc import Generator

import jax
import orbax.checkpoint as ocp

from nemo_jax.core import files
from nemo_jax.core.types import InputError, PyTree, first_line

_KEPT = 3
# How orbax names what it is writing.
_UNFINISHED = '.orbax-checkpoint-tmp'
# Seconds after an error until all threads have ended.
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
    # Else orbax asks the newest folder what the others hold.
    item_names=('leaves', 'digest'),
    options=ocp.CheckpointManagerOptions(
      max_to_keep=_KEPT,
      create=False,
      # Else what is known of each is read at once, and none may be damaged.
      lightweight_initialize=True,
      enable_async_checkpointing=False,
      # The process that stores waits for no other.
      multiprocessing_options=ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}
      ),
    ),
  )


@contextlib.contextmanager
def _unlogged() -> Generator[None]:
  """Within, an error is told once: it is raised.

  orbax's threads log it as well, with tracebacks; and what tensorstore still
  has to say then meets an event loop that orbax has closed.
  """
  logger, hook = logging.getLogger('absl'), sys.unraisablehook
  level = logger.level

  def quiet(told) -> None:
    if str(told.exc_value) != 'Event loop is closed':
      hook(told)

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
  """What the operating system refused, if that is the cause of an error.

  orbax and tensorstore wrap it: as a cause, or as words in a ValueError.
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
  """Stores a generation; orbax renames it into place when it is complete.

  Args:
    checkpoints: from `open_checkpoints`.
    generation: its number.
    state: arrays.
    run: digest of what the run was started with, which is stored beside it.

  Raises:
    InputError: the operating system refuses, for a full disk for example.
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
        force=True,  # also where a stray folder has a later number
      )
  except Exception as error:  # orbax and tensorstore raise many kinds
    folder = pathlib.Path(checkpoints.directory)
    _delete_unfinished(folder)
    if reason := _by_system(error):
      raise InputError(f'cannot use {folder}: {reason}') from error
    raise


def _delete_unfinished(folder: pathlib.Path) -> None:
  for path in folder.glob(f'*{_UNFINISHED}*'):
    files.delete(path)


def _read(checkpoints, generation: int, state: PyTree, run: str | None):
  """One checkpoint in the structure of `state`; ValueError if unusable."""
  if (pathlib.Path(checkpoints.directory) / str(generation)).is_symlink():
    raise ValueError('it is a link')
  leaves, treedef = jax.tree.flatten(jax.device_get(state))
  try:
    with _unlogged():
      stored = checkpoints.restore(
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
  """The last usable checkpoint, and a line for each later one that is not.

  Args:
    checkpoints: from `open_checkpoints`.
    state: the state of a new run, which is returned if there is nothing yet;
      gives structure and shapes.
    run: digest of what the run was started with; those of others are unusable.

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
  """Deletes what stands where the checkpoints of later generations go.

  Those were damaged or never finished. Links are deleted, not followed.
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
