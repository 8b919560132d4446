"""Species: one file a way to search, found by its name.

A species file defines `BUILDER`, a `SpeciesBuilder` around its function
`make(problem, population_size, ...)`. The name of the file is the name a user
types; what is behind a colon names the algorithm that evolves it, where there
is a choice: `direct`, `gcn`, `gcn:Open_ES`. `nemo` and `paper` are teams of
several. A path that ends in `.py` names a species of the user's own.
"""

import inspect
import sys
from collections.abc import Sequence

from nemo_jax.core import plugins
from nemo_jax.core.types import InputError
from nemo_jax.search.problem import SpeciesBuilder

# The team of a search unless it is told otherwise, chosen on other seeds than
# those that experiments.compare reports; and that of arXiv 2106.07611.
NEMO = ('lagrangian', 'thompson', 'priced_gcn', 'direct')
PAPER = ('direct', 'floor', 'gcn', 'graph_unet')


def names() -> list[str]:
  """The names of all species."""
  return plugins.names(sys.modules[__name__])


def _takes(builder: SpeciesBuilder, option: str) -> bool:
  """Whether its `make` has such an argument."""
  return option in inspect.signature(builder.make).parameters


def find(name: str) -> SpeciesBuilder:
  """The builder of the species of that name.

  Raises:
    InputError: the name, or the algorithm behind its colon, is unknown; or the
      file is no species.
  """
  name, _, algorithm = name.partition(':')
  if not plugins.is_own(name) and name not in names():
    raise InputError(
      f'unknown species {name!r}; the choices are {", ".join(names())}, the '
      'teams nemo and paper, and a file of your own'
    )
  here = sys.modules[__name__]
  builder = plugins.find(here, 'species', name, ['BUILDER']).BUILDER
  if not isinstance(builder, SpeciesBuilder):
    raise InputError(
      f'BUILDER of species {name!r} is a {type(builder).__name__}; give a '
      'SpeciesBuilder, such as SpeciesBuilder(make)'
    )
  if not algorithm:
    return builder
  if not _takes(builder, 'algorithm'):
    raise InputError(f'species {name!r} has no choice of algorithm')
  # evosax computes while it is imported, and nothing may before
  # `jax.distributed` has joined the processes of a run.
  from nemo_jax.search.neuroevolution import check_algorithm

  check_algorithm(algorithm)
  return builder.with_options(algorithm=algorithm)


def need_prior(words: Sequence[str]) -> list[str]:
  """Those of the species in a team that need the problem's prior."""
  return [name for name, builder in team(words).items() if builder.needs_prior]


def is_blind(words: Sequence[str]) -> bool:
  """Whether a team searches without sensitivities, as all with `paper` do."""
  return 'paper' in words


def _without_migrants(builder: SpeciesBuilder) -> SpeciesBuilder:
  """The species without parents from other species, as in the paper."""
  if not _takes(builder, 'migrant_rate'):
    return builder
  return builder.with_options(migrant_rate=0.0)


def team(words: Sequence[str]) -> dict[str, SpeciesBuilder]:
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
      members += [(name, _without_migrants(find(name))) for name in PAPER]
    else:
      known = NEMO if word == 'nemo' else (word,)
      members += [(name, find(name)) for name in known]
  found = dict(members)
  if len(found) < len(members):
    raise InputError(
      f'species {", ".join(name for name, _ in members)}: give each once'
    )
  needing = [name for name, builder in found.items() if builder.needs_prior]
  if is_blind(words) and needing:
    raise InputError(
      f'paper is without sensitivities, which {needing[0]!r} needs; name '
      f'species of it, such as {",".join((PAPER[0], needing[0]))}'
    )
  return found
