"""What a search carries from one generation to the next, and what it logs."""

from typing import NamedTuple

from nemo_jax.core.types import Array, PyTree
from nemo_jax.search.problem import Population

Metrics = dict[str, Array]


class State(NamedTuple):
  """Everything a search carries from one generation to the next."""

  generation: Array  # int32[]
  population: Population  # [P, ...], rows of a species together
  # [A, ...], every non-dominated point seen; see `pareto.archive_insert`.
  archive: Population
  species: tuple[PyTree, ...]  # the private state of each
  evaluations: Array  # int32[S], done for each species; see `_add`
  failures: Array  # int32[], evaluations with an objective that is not finite
  surrogate: PyTree  # its state; () without one
