"""Files of a run: flags, checkpoints, metrics, front, tables and pictures."""

from nemo_jax.runs.checkpoints import (
  discard_after,
  open_checkpoints,
  restore,
  save,
)
from nemo_jax.runs.folder import (
  check_flags,
  check_folder,
  evolve,
  finished,
  locked,
  started,
  write_flags,
)
from nemo_jax.runs.front import Front, Point
from nemo_jax.runs.metrics import append_metrics, read_metrics, rewind_metrics

__all__ = [
  'Front',
  'Point',
  'append_metrics',
  'check_flags',
  'check_folder',
  'discard_after',
  'evolve',
  'finished',
  'locked',
  'open_checkpoints',
  'read_metrics',
  'restore',
  'rewind_metrics',
  'save',
  'started',
  'write_flags',
]
