"""A Graph U-Net over the problem's graph, its weights evolved."""

from nemo_jax.search import neuroevolution, policies
from nemo_jax.search.problem import Problem, Species, SpeciesBuilder


def make(
  problem: Problem,
  population_size: int,
  algorithm: str = 'SSNE',
  hidden: int = 8,
) -> Species:
  """One of NEMO's species of networks; see `neuroevolution.make`."""
  network = policies.GraphUNet(problem.allowed.shape[1], hidden)
  policy = neuroevolution.most_likely(problem, network)
  return neuroevolution.make(policy, population_size, algorithm)


BUILDER = SpeciesBuilder(make)
