"""Flags and start-up of runs on several devices and several hosts.

`jax.distributed` joins the processes, and `jax.sharding` divides the work among
all devices of all processes. Every process runs the same command; only the
first writes files and prints.
"""

import contextlib
import os
import re
import sys
import warnings
from collections.abc import Generator

import jax
from absl import flags

from experiments import define
from experiments.launch import explain
from nemo_jax.core.types import InputError

_MOST_PROCESSES = 2**16

define.whole(
  'image_devices',
  1,
  'devices that divide the images of one candidate; the others take other '
  'candidates',
)
flags.DEFINE_bool(
  'distributed',
  False,
  'join the processes of the cluster (Cloud TPU, Slurm, Open MPI, Kubernetes)',
)
flags.DEFINE_string(
  'coordinator',
  None,
  'join processes by hand: host and port on which the first one listens',
)
define.whole(
  'processes',
  None,
  'with --coordinator: number of processes',
  high=_MOST_PROCESSES,
)
define.whole(
  'process_id',
  None,
  'with --coordinator: number of this process, from 0',
  low=0,
  high=_MOST_PROCESSES - 1,
)
define.whole(
  'lost_after',
  30,
  'seconds of silence after which a process counts as lost',
  high=24 * 60 * 60,
)


def check() -> None:
  """Raises `InputError` for processes that cannot be joined."""
  given = [value is not None for value in _by_hand()]
  if any(given) and (define.own(__name__).distributed or not all(given)):
    raise InputError(
      '--coordinator, --processes and --process_id go together; with '
      '--distributed the cluster gives them'
    )
  if not any(given):
    return
  own = define.own(__name__)
  match = re.fullmatch(r'([!-~]+):([0-9]{1,5})', own.coordinator)
  if not match or not 1 <= int(match[2]) <= 65535:
    raise InputError(
      f'--coordinator={own.coordinator} is no host and port, such as '
      '10.0.0.1:9000'
    )
  if own.process_id >= own.processes:
    raise InputError(
      f'--process_id={own.process_id} has to be below '
      f'--processes={own.processes}'
    )


def _by_hand() -> tuple[str | None, int | None, int | None]:
  """Values of the flags that join processes by hand."""
  own = define.own(__name__)
  return own.coordinator, own.processes, own.process_id


def _join() -> None:
  """Joins the processes of the flags."""
  # The service would handle SIGTERM, which is to end the process.
  jax.config.update('jax_enable_preemption_service', False)
  try:
    jax.distributed.initialize(
      *_by_hand(), heartbeat_timeout_seconds=define.own(__name__).lost_after
    )
  except (RuntimeError, ValueError) as error:
    reason = str(error).strip().splitlines()[0]
    raise InputError(f'the processes cannot be joined: {reason}') from error


@contextlib.contextmanager
def joined() -> Generator[None]:
  """Context in which the processes are joined, and only the first prints.

  An error in one process ends all of them, since the others would block. What
  is stored stays, and the run can be resumed on any number of devices.
  """
  check()
  own = define.own(__name__)
  if not (own.distributed or own.coordinator):
    yield
    return
  _join()
  with contextlib.ExitStack() as stack:
    if jax.process_index():
      silence = stack.enter_context(open(os.devnull, 'w'))
      stack.enter_context(contextlib.redirect_stdout(silence))
      stack.enter_context(warnings.catch_warnings(action='ignore'))
    try:
      yield
    except Exception as error:
      if line := explain(error):
        _leave(f'error: {line}')
      if not isinstance(error, jax.errors.JaxRuntimeError):
        raise
      reason = str(error).strip().splitlines()[0]
      message = (
        f'error: process {jax.process_index()} of {jax.process_count()} lost '
        f'another one ({reason}); start all of them again to resume'
      )
      _leave(message)


def _leave(message: str) -> None:
  """Ends this process at once; a regular exit would wait for the others."""
  print(message, file=sys.stderr, flush=True)
  os._exit(1)
