"""MPQCO: convex fronts of a multiple-choice knapsack on sensitivities."""

import jax
import numpy as np

from nemo_jax.arena.baseline import Baseline, Score
from nemo_jax.core.types import Array
from nemo_jax.search import knapsack
from nemo_jax.search import prior as prior_lib
from nemo_jax.search.problem import Problem


def search(
  key: Array, problem: Problem, evaluations: int, score: Score
) -> None:
  """Scores random rows of `knapsack.front`, at most `evaluations`."""
  found = knapsack.groups(prior_lib.of(problem), problem.allowed)
  rows = knapsack.front(found, len(problem.allowed))
  order = jax.random.permutation(key, len(rows))[:evaluations]
  score(rows[np.asarray(order)])


BASELINE = Baseline(search, needs_prior=True)
