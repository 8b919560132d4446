"""Baselines that NEMO is measured against: one file each, found by its name.

A baseline file defines `BASELINE`, a `Baseline`. The name of the file is the
name a user types; a path that ends in `.py` names one of the user's own.
"""

import sys

from nemo_jax.arena.baseline import Baseline
from nemo_jax.core import plugins


def names() -> list[str]:
  """The names of all baselines."""
  return plugins.names(sys.modules[__name__])


def has(name: str) -> bool:
  """Whether a name is of a baseline; a file may be of a species as well.

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
    InputError: the name is unknown.
  """
  here = sys.modules[__name__]
  return plugins.find(here, 'baseline', name, ['BASELINE']).BASELINE
