"""Neuroevolution of a graph convolutional network over the problem's graph."""

from nemo_jax.search import neuroevolution, policies
from nemo_jax.search.problem import Problem, Species, SpeciesBuilder


def make(
  problem: Problem,
  population_size: int,
  algorithm: str = 'SSNE',
  hidden: int = 8,
) -> Species:
  """Species of weights of a GCN; see `neuroevolution.make`.

  One of NEMO's species (arXiv 2106.07611).

  Args:
    problem: the problem to search.
    population_size: P.
    algorithm: one of `neuroevolution.algorithms()`.
    hidden: features of the hidden layers.
  """
  network = policies.GCN(problem.allowed.shape[1], hidden)
  policy = neuroevolution.most_likely(problem, network)
  return neuroevolution.make(policy, population_size, algorithm)


BUILDER = SpeciesBuilder(make)
