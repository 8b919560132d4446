"""Baselines that NEMO is compared with, one file each, found by name.

A baseline file defines `BASELINE`, a `Baseline`. The name of the file is the
name of the baseline; a name that is a path ending in `.py`, or a module with a
dot, is a baseline of the user.
"""

import sys

from nemo_jax.arena.baseline import Baseline
from nemo_jax.core import plugins


def names() -> list[str]:
  """The names of the baselines in this package, sorted."""
  return plugins.names(sys.modules[__name__])


def has(name: str) -> bool:
  """Whether a name is that of a baseline; a user's file may be a species.

  Raises:
    InputError: the file cannot be imported.
  """
  if not plugins.is_own(name):
    return name in names()
  here = sys.modules[__name__]
  return hasattr(plugins.find(here, 'method', name, []), 'BASELINE')


def find(name: str) -> Baseline:
  """The baseline of that name.

  Raises:
    InputError: the name is unknown, or the file defines no baseline.
  """
  here = sys.modules[__name__]
  return plugins.find(here, 'baseline', name, ['BASELINE']).BASELINE
