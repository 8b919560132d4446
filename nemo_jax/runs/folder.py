"""A run's folder: its flags, checkpoints, metrics and front; and resuming.

flags.json      what the run was started with, and digests of what it read
metrics.jsonl   a line a generation
checkpoints/    the last generations, by orbax
front.json      the result, when the run has ended

All of it carries digests, and the digest of flags.json says in each checkpoint
and in the front which run they are of.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any, Protocol, TypeVar

import orbax.checkpoint as ocp

from nemo_jax.core import files
from nemo_jax.core.types import Array, InputError
from nemo_jax.runs.checkpoints import save
from nemo_jax.runs.front import FRONT_FILE, Front
from nemo_jax.runs.metrics import append_metrics


class State(Protocol):
  """What is stored: a tree of arrays that counts its generations."""

  @property
  def generation(self) -> Array:
    """int32[], how many have been made."""


S = TypeVar('S', bound=State)

# In flags.json, beside the flags: what the run read, by its digest.
_READ = 'digests'


def check_folder(path: str | os.PathLike, read_only: bool = False) -> None:
  """Raises `InputError` unless the folder is there or can be made.

  Args:
    path: of the folder.
    read_only: whether one that is there serves without being writable.
  """
  path = files.local(path).absolute()
  with files.errors_named(path):
    there = next(p for p in (path, *path.parents) if p.exists())
    serves = read_only and there == path
    if not there.is_dir() or not (serves or os.access(there, os.W_OK)):
      raise InputError(f'cannot use {path}: {there} is no folder to write to')


@contextlib.contextmanager
def locked(workdir: str | os.PathLike) -> Generator[None]:
  """Makes a run's folder and keeps other processes out of it.

  The lock goes with the process, however it ends.

  Raises:
    InputError: another process holds it, or the folder cannot be made.
  """
  workdir = files.local(workdir)
  with contextlib.ExitStack() as stack:
    with files.errors_named(workdir):
      workdir.mkdir(parents=True, exist_ok=True)
      file = stack.enter_context(open(workdir / '.lock', 'w'))
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError as error:
        raise InputError(f'another process is running in {workdir}') from error
    yield


def _with_digests(flags: Mapping, digests: Mapping | None) -> dict[str, Any]:
  return dict(flags) if digests is None else {**flags, _READ: dict(digests)}


def _changes(stored: Mapping, given: Mapping) -> Iterator[str]:
  """What differs, in words; digests say what they are of."""
  for name, value in sorted(given.items()):
    if name == _READ:
      before = stored.get(name)
      before = before if isinstance(before, dict) else {}
      for what, digest in value.items():
        if what not in before:
          yield f'{what}: not recorded'
        elif before[what] != digest:
          yield f'{what} changed'
    elif stored.get(name) != value:
      yield f'{name}={stored.get(name)!r} became {value!r}'


def check_flags(
  workdir: str | os.PathLike,
  flags: Mapping[str, Any],
  digests: Mapping[str, str] | None = None,
) -> None:
  """Compares what a run in the folder was started with, if there is one.

  Only the names given are compared.

  Args:
    workdir: the run's folder.
    flags: what JSON can hold, by name.
    digests: of what the run reads; a name says what it is of.

  Raises:
    files.DamagedError: flags.json is not as it was written.
    InputError: a flag, or what the run read, differs from that of the run.
  """
  path = files.local(workdir) / 'flags.json'
  if not path.exists():
    return
  stored = files.read_json(path)
  # Those of older versions have no digest.
  if 'sha256' in stored and not files.is_sealed(stored):
    raise files.DamagedError(f'{path} is damaged: its digest does not match')
  changed = list(_changes(stored, _with_digests(flags, digests)))
  if changed:
    raise InputError(
      f'{workdir} holds a run with other flags or files '
      f'({"; ".join(changed)}); give the same to resume it or another --workdir'
    )


def _check_results(workdir: pathlib.Path, run: str) -> None:
  """Raises `InputError` if results are there, and none is of this run."""
  results = ['front.json', 'compare.json', 'checkpoints/*/digest/metadata']
  found = [path for pattern in results for path in workdir.glob(pattern)]
  owners = set()
  for path in found:
    with contextlib.suppress(InputError):
      owners.add(files.read_json(path).get('run'))
  if found and run not in owners:
    raise InputError(
      f'{workdir} has results but no flags.json, and they are of other flags '
      'or files; give another --workdir'
    )


def write_flags(
  workdir: str | os.PathLike,
  flags: Mapping[str, Any],
  digests: Mapping[str, str] | None = None,
) -> str:
  """Starts a run's folder; from now on it takes no others. Returns its digest.

  Args:
    workdir: the run's folder.
    flags: what JSON can hold, by name.
    digests: of what the run reads; a name says what it is of.

  Raises:
    InputError: there are results of another run, or the operating system
      refuses.
  """
  content = files.seal(_with_digests(flags, digests))
  path = files.local(workdir) / 'flags.json'
  # What is there has been compared; a full disk is no reason to stop here.
  if not path.exists():
    _check_results(path.parent, content['sha256'])
    text = json.dumps(content, indent=2, sort_keys=True) + '\n'
    files.write_text(path, text)
  return content['sha256']


@contextlib.contextmanager
def started(
  workdir: str | os.PathLike,
  flags: Mapping[str, Any],
  digests: Mapping[str, str],
) -> Generator[tuple[str, Front | None]]:
  """The digest of a run, and its front if it has ended.

  Within, no other process runs in the folder, and errors of the operating
  system name it. A run that has ended is not locked: it may be on a disk that
  is read-only.

  Args:
    workdir: the run's folder, which is made.
    flags: see `check_flags`.
    digests: see `check_flags`.

  Raises:
    InputError: see `check_flags`, `locked` and `write_flags`.
  """
  run = files.seal(_with_digests(flags, digests))['sha256']
  check_flags(workdir, flags, digests)
  if front := finished(workdir, run):
    yield run, front
    return
  with locked(workdir), files.errors_named(workdir):
    # Another process may have been here since.
    check_flags(workdir, flags, digests)
    write_flags(workdir, flags, digests)
    yield run, None


def evolve(
  workdir: str | os.PathLike | None,
  checkpoints: ocp.CheckpointManager | None,
  step: Callable[[S], tuple[S, dict[str, Array]]],
  state: S,
  generations: int,
  run: str | None = None,
) -> Iterator[tuple[S, dict[str, Array]]]:
  """The state and metrics of each generation still to come, all stored.

  Without `checkpoints` nothing is stored: another process does it. `run` is
  what `started` gave.

  Metrics go first: if a kill comes between, `rewind_metrics` takes the line
  back, and the generation is repeated from the checkpoint before.
  """
  for generation in range(int(state.generation) + 1, generations + 1):
    state, metrics = step(state)
    if workdir is not None and checkpoints is not None:
      append_metrics(workdir, metrics)
      save(checkpoints, generation, state, run)
    yield state, metrics


def finished(workdir: str | os.PathLike, run: str) -> Front | None:
  """The front of a run that has ended; None where it is still to be written.

  Raises:
    InputError: it is of a version that is not known.
  """
  if not (files.local(workdir) / FRONT_FILE).exists():
    return None
  try:
    front = Front.load(workdir)
  except files.DamagedError as error:
    warnings.warn(f'{error}; it is written again', stacklevel=2)
    return None
  return front if front.run == run else None
