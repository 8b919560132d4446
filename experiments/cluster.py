"""Flags and start-up of runs on several devices and several hosts.

The engine is JAX's own: `jax.distributed` joins the processes, `jax.sharding`
divides the work. All devices of all processes are used. Every process runs the
same command; only the first writes, and prints.
"""

import contextlib
import os
import sys
from collections.abc import Iterator

import jax
from absl import flags

from nemo_jax.base import InputError

FLAGS = flags.FLAGS

flags.DEFINE_integer(
  'image_devices',
  1,
  'devices that divide the images of one candidate; the others take other '
  'candidates',
  1,
)
flags.DEFINE_bool(
  'distributed',
  False,
  'join processes as the cluster says (Cloud TPU, Slurm, Open MPI, Kubernetes)',
)
flags.DEFINE_string(
  'coordinator',
  None,
  'join processes by hand: host and port where the first one listens',
)
flags.DEFINE_integer('processes', None, 'with --coordinator: how many', 1)
flags.DEFINE_integer('process_id', None, 'with --coordinator: 0, 1, ...', 0)
flags.DEFINE_integer(
  'lost_after', 30, 'seconds of silence after which a process counts as lost', 1
)

# Flags that say where a run takes place, not what it is.
PLACES = tuple(
  flag.name for flag in FLAGS.get_flags_for_module(sys.modules[__name__])
)


def _join() -> None:
  """Joins the processes of the flags."""
  by_hand = FLAGS.coordinator, FLAGS.processes, FLAGS.process_id
  given = [value is not None for value in by_hand]
  if any(given) and not all(given):
    raise InputError(
      '--coordinator, --processes and --process_id go together; with '
      '--distributed the cluster says them'
    )
  try:
    jax.distributed.initialize(
      *by_hand, heartbeat_timeout_seconds=FLAGS.lost_after
    )
  except (RuntimeError, ValueError) as error:
    reason = str(error).strip().splitlines()[0]
    raise InputError(f'the processes cannot be joined: {reason}') from error


@contextlib.contextmanager
def joined() -> Iterator[None]:
  """Within, all processes of the flags are joined and only the first prints.

  A process that fails ends all others: they would wait for it. What is stored
  stays, and the run resumes on any number of devices.
  """
  if not (FLAGS.distributed or FLAGS.coordinator):
    yield
    return
  _join()
  with contextlib.ExitStack() as stack:
    if jax.process_index():
      silence = stack.enter_context(open(os.devnull, 'w'))
      stack.enter_context(contextlib.redirect_stdout(silence))
    try:
      yield
    except jax.errors.JaxRuntimeError as error:
      reason = str(error).strip().splitlines()[0]
      message = (
        f'error: process {jax.process_index()} of {jax.process_count()} lost '
        f'another one ({reason}); start all of them again to resume'
      )
      _leave(message)
    except InputError as error:
      _leave(f'error: {error}')


def _leave(message: str) -> None:
  """Ends this process at once: to say goodbye it would wait for the others."""
  print(message, file=sys.stderr, flush=True)
  os._exit(1)
