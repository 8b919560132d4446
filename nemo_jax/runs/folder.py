"""A run's folder: its flags, checkpoints, metrics and front; and resuming.

flags.json      the flags of the run, and digests of the files it read
metrics.jsonl   a line for each generation
checkpoints/    the last generations, by orbax
front.json      the result, once the run has ended

All of them hold digests of their content. Each checkpoint and the front also
hold the digest of flags.json, which identifies the run.
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
  """The state of a search: a pytree of arrays with a generation."""

  @property
  def generation(self) -> Array:
    """int32[], the number of generations so far."""


S = TypeVar('S', bound=State)

# Key in flags.json of the digests of files that the run read.
_READ = 'digests'


def check_folder(path: str | os.PathLike, read_only: bool = False) -> None:
  """Raises `InputError` unless the folder is writable or can be made.

  Args:
    path: of the folder.
    read_only: whether a folder that exists need not be writable.
  """
  path = files.local(path).absolute()
  with files.errors_named(path):
    there = next(p for p in (path, *path.parents) if p.exists())
    serves = read_only and there == path
    if not there.is_dir() or not (serves or os.access(there, os.W_OK)):
      raise InputError(f'cannot use {path}: {there} is no folder to write to')


@contextlib.contextmanager
def locked(workdir: str | os.PathLike) -> Generator[None]:
  """Context that makes a run's folder and locks it for this process.

  The operating system releases the lock when the process ends.

  Raises:
    InputError: another process has the lock, or the folder cannot be made.
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
  """Content of flags.json, without its own digest."""
  return dict(flags) if digests is None else {**flags, _READ: dict(digests)}


def _changes(stored: Mapping, given: Mapping) -> Iterator[str]:
  """Messages on the flags and files that differ from the stored ones."""
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
  """Raises `InputError` if the folder holds a run with other flags or files.

  Only the given names are compared.

  Args:
    workdir: the run's folder.
    flags: values of JSON's types, by name.
    digests: of the files that the run reads, by a description of each.

  Raises:
    files.DamagedError: flags.json differs from what was written.
    InputError: a flag or a digest differs.
  """
  path = files.local(workdir) / 'flags.json'
  if not path.exists():
    return
  stored = files.read_json(path)
  # Files of older versions have no digest.
  if 'sha256' in stored and not files.is_sealed(stored):
    raise files.DamagedError(f'{path} is damaged: its digest does not match')
  changed = list(_changes(stored, _with_digests(flags, digests)))
  if changed:
    raise InputError(
      f'{workdir} holds a run with other flags or files '
      f'({"; ".join(changed)}); give the same to resume it or another --workdir'
    )


def _check_results(workdir: pathlib.Path, run: str) -> None:
  """Raises `InputError` if there are results, and none is of this run."""
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
  """Writes flags.json if it is absent; returns the digest of the run.

  From then on `check_flags` refuses other runs in the folder.

  Args:
    workdir: the run's folder.
    flags: see `check_flags`.
    digests: see `check_flags`.

  Raises:
    InputError: there are results of another run, or an error of the operating
      system.
  """
  content = files.seal(_with_digests(flags, digests))
  path = files.local(workdir) / 'flags.json'
  # A file that exists has been compared; it is not written again, which a full
  # disk would prevent.
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
  """Context of a run, with its digest, and its front if it has ended.

  In the context no other process can run in the folder, and errors of the
  operating system name the folder. A run that has ended is not locked, since it
  may be on a read-only disk.

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
    # Again, since another process may have run before the lock was taken.
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
  """Yields state and metrics of each generation that is left, and stores them.

  Metrics are written before the checkpoint. If the process is killed between
  the two, `rewind_metrics` deletes the line, and the generation is repeated
  from the checkpoint before.

  Args:
    workdir: the run's folder; None stores nothing.
    checkpoints: of the folder; None stores nothing, as in processes other than
      the first.
    step: from a state to the next, and its metrics.
    state: to start from.
    generations: number of the last generation.
    run: digest of the run, from `started`.

  Raises:
    InputError: an error of the operating system.
  """
  for generation in range(int(state.generation) + 1, generations + 1):
    state, metrics = step(state)
    if workdir is not None and checkpoints is not None:
      append_metrics(workdir, metrics)
      save(checkpoints, generation, state, run)
    yield state, metrics


def finished(workdir: str | os.PathLike, run: str) -> Front | None:
  """The front of a run that has ended; None if there is none of this run.

  A damaged front counts as none, with a warning.

  Args:
    workdir: the run's folder.
    run: digest of the run.

  Raises:
    InputError: the file has an unknown version.
  """
  if not (files.local(workdir) / FRONT_FILE).exists():
    return None
  try:
    front = Front.load(workdir)
  except files.DamagedError as error:
    warnings.warn(f'{error}; it is written again', stacklevel=2)
    return None
  return front if front.run == run else None
