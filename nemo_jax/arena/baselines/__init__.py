"""Methods that NEMO is measured against: one file a rival, found by its name.

A rival is a function `search(key, problem, evaluations, score)`. It has so many
evaluations, and gets objectives [n, M] of configurations [n, N] from `score`,
which counts them and keeps what is worth keeping; it returns nothing. A file
says with `INFORMED` whether it reads the problem's estimate, which costs
evaluations too.
"""

import importlib
import pkgutil

from nemo_jax.core.types import InputError


def names() -> list[str]:
  """The names of all rivals."""
  return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find(name: str):
  """The module of a rival, with `search` and `INFORMED`.

  Raises:
    InputError: the name is unknown.
  """
  if name not in names():
    raise InputError(
      f'unknown rival {name!r}; the choices are {", ".join(names())}'
    )
  return importlib.import_module(f'{__name__}.{name}')
