"""State of a search between generations, and its metrics."""

from typing import NamedTuple

from jaxtyping import Int

from nemo_jax.core.types import Array, PyTree
from nemo_jax.search.problem import Population

Metrics = dict[str, Array]


class State(NamedTuple):
  """State of a search between two generations."""

  generation: Int[Array, '']  # int32, number of generations so far
  population: Population  # [P, ...], rows of a species together
  # [A, ...], the non-dominated solutions so far; see `pareto.archive_insert`.
  archive: Population
  species: tuple[PyTree, ...]  # the state of each species
  # int32, of each species so far; at most the largest int32, as the next.
  evaluations: Int[Array, ' S']
  failures: Int[Array, '']  # int32, evaluations that were not finite
  surrogate: PyTree  # the state of the surrogate; () without one
