"""Floor-rounding direct search: biased to compression."""

import jax.numpy as jnp

from nemo_jax.search.problem import Problem, Species, SpeciesBuilder
from nemo_jax.search.species import direct


def make(
  problem: Problem, population_size: int, migrant_rate: float = 0.5
) -> Species:
  """NEMO's second species: `direct`, but rounded down to the choice below.

  The highest choice is a single point at the end of the range, so that it is
  almost never taken: the species is biased to compression, as in the paper.
  """
  return direct.make(
    problem, population_size, rounding=jnp.floor, migrant_rate=migrant_rate
  )


BUILDER = SpeciesBuilder(make)
