"""A run's folder: its flags, checkpoints, metrics and front; and resuming.

flags.json      what the run was started with
metrics.jsonl   a line a generation
checkpoints/    the last generations, by orbax
front.json      the result, when the run has ended
"""

import contextlib
import fcntl
import json
import os
import pathlib
import platform
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

import nemo_jax
from nemo_jax import files
from nemo_jax.base import InputError, PyTree

FRONT_VERSION = 1


def _plain(value: Any) -> Any:
  """Arrays as lists of numbers, infinities as None: what JSON can hold."""
  array = np.asarray(value)
  if array.ndim:
    return [_plain(x) for x in array]
  number = array.item()
  return number if np.isfinite(number) else None


def check_folder(path: str | os.PathLike) -> None:
  """Raises `InputError` unless the folder is there or can be made."""
  path = files.local(path).absolute()
  there = next(p for p in (path, *path.parents) if p.exists())
  if not there.is_dir() or not os.access(there, os.W_OK):
    raise InputError(f'cannot use {path}: {there} is no folder to write to')


@contextlib.contextmanager
def locked(workdir: str | os.PathLike) -> Iterator[None]:
  """Makes a run's folder and keeps other processes out of it.

  The lock goes with the process, however it ends.

  Raises:
    InputError: another process holds it, or the folder cannot be made.
  """
  with contextlib.ExitStack() as stack:
    try:
      pathlib.Path(workdir).mkdir(parents=True, exist_ok=True)
      file = stack.enter_context(open(pathlib.Path(workdir) / '.lock', 'w'))
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise InputError(f'another process is running in {workdir}') from error
    except OSError as error:
      raise InputError(f'cannot use {workdir}: {error.strerror}') from error
    yield


def check_flags(workdir: str | os.PathLike, flags: dict[str, Any]) -> None:
  """Compares what a run in the folder was started with, if there is one.

  Only the names given are compared.

  Raises:
    InputError: a flag differs from that of the run in the folder.
  """
  path = pathlib.Path(workdir) / 'flags.json'
  if not path.exists():
    return
  try:
    stored = dict(json.loads(path.read_text()))
  except (TypeError, ValueError) as error:
    raise InputError(f'{path} is damaged: {error}') from error
  changed = [
    f'{name}={stored.get(name)!r} became {value!r}'
    for name, value in sorted(flags.items())
    if stored.get(name) != value
  ]
  if changed:
    raise InputError(
      f'{workdir} holds a run with other flags ({"; ".join(changed)}); give '
      'the same flags to resume it or another --workdir'
    )


def write_flags(workdir: str | os.PathLike, flags: dict[str, Any]) -> None:
  """Starts a run's folder; from now on it takes no other flags."""
  pathlib.Path(workdir).mkdir(parents=True, exist_ok=True)
  text = json.dumps(flags, indent=2, sort_keys=True) + '\n'
  files.write_text(pathlib.Path(workdir) / 'flags.json', text)


def open_checkpoints(workdir: str | os.PathLike) -> ocp.CheckpointManager:
  """The manager of a run's checkpoints; it keeps the last three."""
  folder = pathlib.Path(workdir).absolute() / 'checkpoints'
  folder.mkdir(parents=True, exist_ok=True)
  me = jax.process_index()
  return ocp.CheckpointManager(
    folder,
    options=ocp.CheckpointManagerOptions(
      max_to_keep=3,
      create=False,
      enable_async_checkpointing=False,
      # The process that stores waits for no other.
      multiprocessing_options=ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}
      ),
    ),
  )


def save(
  checkpoints: ocp.CheckpointManager, generation: int, state: PyTree
) -> None:
  """Stores a generation; orbax renames it into place when it is complete."""
  leaves = jax.tree.leaves(jax.device_get(state))
  checkpoints.save(
    generation,
    args=ocp.args.Composite(
      leaves=ocp.args.StandardSave(leaves),
      digest=ocp.args.JsonSave({'sha256': files.digest(leaves)}),
    ),
  )


def _read(checkpoints, generation: int, state: PyTree) -> PyTree:
  """One checkpoint in the structure of `state`; ValueError if it is damaged."""
  leaves, treedef = jax.tree.flatten(jax.device_get(state))
  try:
    stored = checkpoints.restore(
      generation,
      args=ocp.args.Composite(
        leaves=ocp.args.StandardRestore(leaves),
        digest=ocp.args.JsonRestore(),
      ),
    )
  except Exception as error:  # orbax and tensorstore raise many kinds
    raise ValueError(str(error).strip().splitlines()[0][:200]) from error
  if files.digest(stored.leaves) != stored.digest['sha256']:
    raise ValueError('its content does not match its checksum')
  return jax.tree.unflatten(treedef, stored.leaves)


def restore(
  checkpoints: ocp.CheckpointManager, state: PyTree
) -> tuple[PyTree, list[str]]:
  """The last readable checkpoint, and a line for each that was damaged.

  Damaged ones are deleted, so that they can be written anew.

  Args:
    checkpoints: from `open_checkpoints`.
    state: the state of a new run, which is returned if there is nothing yet;
      gives structure and shapes.

  Raises:
    InputError: there are checkpoints, and none can be read.
  """
  notes = []
  generations = sorted(checkpoints.all_steps(), reverse=True)
  for generation in generations:
    try:
      return _read(checkpoints, generation, state), notes
    except ValueError as error:
      notes.append(f'checkpoint {generation} is damaged ({error})')
  if generations:
    raise InputError(
      f'no readable checkpoint in {checkpoints.directory}: '
      f'{"; ".join(notes)}; delete the folder to start again'
    )
  return state, notes


def discard_after(checkpoints: ocp.CheckpointManager, generation: int) -> None:
  """Deletes the checkpoints of later generations, which were damaged."""
  for later in checkpoints.all_steps():
    if later > generation:
      checkpoints.delete(later)


def append_metrics(workdir: str | os.PathLike, metrics: dict) -> None:
  """Adds a line to metrics.jsonl."""
  line = json.dumps({name: _plain(value) for name, value in metrics.items()})
  with open(pathlib.Path(workdir) / 'metrics.jsonl', 'a') as file:
    file.write(line + '\n')


def read_metrics(workdir: str | os.PathLike) -> list[dict]:
  """The lines of metrics.jsonl; what is not a generation's is left out."""
  path = pathlib.Path(workdir) / 'metrics.jsonl'
  lines = []
  for line in path.read_text().splitlines() if path.exists() else ():
    with contextlib.suppress(ValueError, TypeError, KeyError):
      metrics = json.loads(line)
      int(metrics['generation'])
      lines.append(metrics)
  return lines


def rewind_metrics(workdir: str | os.PathLike, generation: int) -> None:
  """Forgets the lines of later generations, which will be written again."""
  kept = [m for m in read_metrics(workdir) if m['generation'] <= generation]
  text = ''.join(json.dumps(line) + '\n' for line in kept)
  files.write_text(pathlib.Path(workdir) / 'metrics.jsonl', text)


def evolve(
  workdir: str | os.PathLike,
  checkpoints: ocp.CheckpointManager | None,
  step,
  state: PyTree,
  generations: int,
) -> Iterator[tuple[PyTree, dict]]:
  """The state and metrics of each generation still to come, all stored.

  Without `checkpoints` nothing is stored: another process does it.

  Metrics go first: if a kill comes between, `rewind_metrics` takes the line
  back, and the generation is repeated from the checkpoint before.
  """
  for generation in range(int(state.generation) + 1, generations + 1):
    state, metrics = step(state)
    if checkpoints is not None:
      append_metrics(workdir, metrics)
      save(checkpoints, generation, state)
    yield state, metrics


def write_front(workdir: str | os.PathLike, front: dict[str, Any]) -> None:
  """Writes front.json: `version`, `versions`, then what is given.

  The schema, version 1. `workload`, `seed`, `evaluations`, `objective_names`,
  `bit_widths`, `quantizers` (names, in the order of every `bits`), `points`:
  each with `bits`, `objectives` in the order of their names, `test_accuracy`
  and `species`. Further keys may be added without a new version.
  """
  versions = {
    'nemo_jax': nemo_jax.__version__,
    'jax': jax.__version__,
    'python': platform.python_version(),
  }
  content = {'version': FRONT_VERSION, 'versions': versions} | front
  text = json.dumps(content, indent=1, default=_plain) + '\n'
  files.write_text(pathlib.Path(workdir) / 'front.json', text)


def read_front(workdir: str | os.PathLike) -> dict[str, Any]:
  """The content of front.json.

  Raises:
    InputError: it is absent, damaged, or of a version that is not known.
  """
  path = pathlib.Path(workdir) / 'front.json'
  try:
    front = dict(json.loads(path.read_text()))
  except (OSError, TypeError, ValueError) as error:
    raise InputError(f'cannot read {path}: {error}') from error
  if front.get('version') != FRONT_VERSION:
    raise InputError(
      f'{path} has version {front.get("version")!r}; this package reads '
      f'{FRONT_VERSION}'
    )
  return front
