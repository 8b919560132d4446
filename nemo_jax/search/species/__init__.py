"""Species of the search, one file each, found by name.

A species file defines `BUILDER`, a `SpeciesBuilder` around its function
`make(problem, population_size, ...)`. The name of the species is that of the
file, such as `direct` or `gcn`. If a species can be evolved by several
algorithms, a name after a colon chooses one, such as `gcn:Open_ES`. `nemo` and
`paper` are teams of several species. A path that ends in `.py` is a species
file of the user.
"""

import inspect
import sys
from collections.abc import Sequence

from nemo_jax.core import plugins
from nemo_jax.core.types import InputError
from nemo_jax.search.problem import SpeciesBuilder

# The default team, chosen on other seeds than those that experiments.compare
# reports.
NEMO = ('lagrangian', 'thompson', 'priced_gcn', 'direct')
# The team of arXiv 2106.07611.
PAPER = ('direct', 'floor', 'gcn', 'graph_unet')


def names() -> list[str]:
  """Names of all species of the package."""
  return plugins.names(sys.modules[__name__])


def _takes(builder: SpeciesBuilder, option: str) -> bool:
  """Whether the builder's `make` has an argument of that name."""
  return option in inspect.signature(builder.make).parameters


def find(name: str) -> SpeciesBuilder:
  """Builder of the species of that name.

  Raises:
    InputError: the name, or the algorithm after its colon, is unknown; or the
      file does not define a `SpeciesBuilder`.
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
  # Imported here because importing evosax initializes JAX's backend, which must
  # not happen before `jax.distributed` has joined the processes of a run.
  from nemo_jax.search.neuroevolution import check_algorithm

  check_algorithm(algorithm)
  return builder.with_options(algorithm=algorithm)


def need_prior(words: Sequence[str]) -> list[str]:
  """Names of the species in a team that need the problem's prior."""
  return [name for name, builder in team(words).items() if builder.needs_prior]


def is_blind(words: Sequence[str]) -> bool:
  """Whether a team searches without sensitivities: whether it has `paper`."""
  return 'paper' in words


def _without_migrants(builder: SpeciesBuilder) -> SpeciesBuilder:
  """The builder with a migrant rate of 0, if it has one, as in the paper."""
  if not _takes(builder, 'migrant_rate'):
    return builder
  return builder.with_options(migrant_rate=0.0)


def team(words: Sequence[str]) -> dict[str, SpeciesBuilder]:
  """Builders of the species that the words name, by name and in order.

  Args:
    words: each a name for `find`, or the team `nemo` or `paper`.

  Raises:
    InputError: a species is unknown or named twice, or one needs a prior, which
      a team with `paper` does not have.
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
