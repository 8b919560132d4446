"""Direct search with rounding down, which is biased to compression."""

import jax.numpy as jnp

from nemo_jax.search.problem import Problem, Species, SpeciesBuilder
from nemo_jax.search.species import direct


def make(
  problem: Problem, population_size: int, migrant_rate: float = 0.5
) -> Species:
  """Species as `direct`, but rounded down: NEMO's second species.

  The highest choice is then a single point at the end of the range and is
  almost never taken. The species is biased to compression, as in the paper
  (arXiv 2106.07611).

  Args:
    problem: the problem to search.
    population_size: P.
    migrant_rate: see `direct.make`.
  """
  return direct.make(
    problem, population_size, rounding=jnp.floor, migrant_rate=migrant_rate
  )


BUILDER = SpeciesBuilder(make)
