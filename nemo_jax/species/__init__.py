"""Ways to search: one file a species, found by its name.

A species file has a function `make(problem, population_size, ...)` that
returns a `Species`. The name of the file is the name a user types; what stands
behind a colon names the algorithm that evolves it, where there is a choice:
`direct`, `gcn`, `gcn:Open_ES`.
"""

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable

from nemo_jax.base import InputError, Problem, Species


def names() -> list[str]:
  """The names of all species."""
  return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find(name: str) -> Callable[[Problem, int], Species]:
  """The function (problem, population_size) -> species of that name.

  Raises:
    InputError: the name, or the algorithm behind its colon, is unknown.
  """
  name, _, algorithm = name.partition(':')
  if name not in names():
    raise InputError(
      f'unknown species {name!r}; the choices are {", ".join(names())}'
    )
  make = importlib.import_module(f'{__name__}.{name}').make
  if not algorithm:
    return make
  if 'algorithm' not in inspect.signature(make).parameters:
    raise InputError(f'species {name!r} has no choice of algorithm')
  # evosax computes while it is imported, and nothing may before
  # `jax.distributed` has joined the processes of a run.
  from nemo_jax.neuroevolution import check_algorithm

  check_algorithm(algorithm)
  return functools.partial(make, algorithm=algorithm)
