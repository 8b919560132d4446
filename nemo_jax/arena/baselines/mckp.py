"""The convex fronts of a knapsack on the sensitivities, as MPQCO solves it."""

import jax
import numpy as np

from nemo_jax.arena.baseline import Baseline
from nemo_jax.search import knapsack
from nemo_jax.search import prior as prior_lib


def search(key, problem, evaluations, score) -> None:
  """Of `knapsack.front`, as many at random as there are evaluations for."""
  found = knapsack.groups(prior_lib.of(problem), problem.allowed)
  rows = knapsack.front(found, len(problem.allowed))
  order = jax.random.permutation(key, len(rows))[:evaluations]
  score(rows[np.asarray(order)])


BASELINE = Baseline(search, needs_prior=True)
