"""Ways to search: one file a species, found by its name.

A species file has a function `make(problem, population_size, ...)` that
returns a `Species`. The name of the file is the name a user types; what stands
behind a colon names the algorithm that evolves it, where there is a choice:
`direct`, `gcn`, `gcn:Open_ES`. `nemo` and `paper` are teams of several.
"""

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Sequence

from nemo_jax.core.types import InputError
from nemo_jax.search.problem import Problem, Species

Build = Callable[[Problem, int], Species]

# The team of a search unless it is told otherwise, chosen on other seeds than
# those that experiments.compare reports; and that of arXiv 2106.07611.
NEMO = ('lagrangian', 'thompson', 'priced_gcn', 'direct')
PAPER = ('direct', 'floor', 'gcn', 'graph_unet')


def names() -> list[str]:
  """The names of all species."""
  return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find(name: str) -> Build:
  """The function (problem, population_size) -> species of that name.

  Raises:
    InputError: the name, or the algorithm behind its colon, is unknown.
  """
  name, _, algorithm = name.partition(':')
  if name not in names():
    raise InputError(
      f'unknown species {name!r}; the choices are {", ".join(names())}, and '
      'the teams nemo and paper'
    )
  make = importlib.import_module(f'{__name__}.{name}').make
  if not algorithm:
    return make
  if 'algorithm' not in inspect.signature(make).parameters:
    raise InputError(f'species {name!r} has no choice of algorithm')
  # evosax computes while it is imported, and nothing may before
  # `jax.distributed` has joined the processes of a run.
  from nemo_jax.search.neuroevolution import check_algorithm

  check_algorithm(algorithm)
  return functools.partial(make, algorithm=algorithm)


def need_estimate(words: Sequence[str]) -> list[str]:
  """Those of the species in a team that need the problem's estimate."""
  return [name for name in team(words) if _needs_estimate(name)]


def _needs_estimate(name: str) -> bool:
  module = importlib.import_module(f'{__name__}.{name.partition(":")[0]}')
  return getattr(module, 'NEEDS_ESTIMATE', False)


def is_blind(words: Sequence[str]) -> bool:
  """Whether a team searches without sensitivities, as all with `paper` do."""
  return 'paper' in words


def _alone(make: Build) -> Build:
  """The species without parents from other species, as in the paper."""
  if 'guest_rate' not in inspect.signature(make).parameters:
    return make
  return functools.partial(make, guest_rate=0.0)


def team(words: Sequence[str]) -> dict[str, Build]:
  """The species that words stand for, by name, in their order.

  Args:
    words: names for `find`, `nemo` or `paper`.

  Raises:
    InputError: a name is unknown, or there twice, or needs what `paper` does
      without.
  """
  members = []
  for word in words:
    if word == 'paper':
      members += [(name, _alone(find(name))) for name in PAPER]
    else:
      known = NEMO if word == 'nemo' else (word,)
      members += [(name, find(name)) for name in known]
  found = dict(members)
  if len(found) < len(members):
    raise InputError(
      f'species {", ".join(name for name, _ in members)}: give each once'
    )
  needing = [name for name in found if _needs_estimate(name)]
  if is_blind(words) and needing:
    raise InputError(
      f'paper is without sensitivities, which {needing[0]!r} needs; name '
      f'species of it, such as {",".join((PAPER[0], needing[0]))}'
    )
  return found
