"""Uniform configurations: the same choice at every node."""

import numpy as np

from nemo_jax.arena.baseline import Baseline, Score
from nemo_jax.core.types import Array
from nemo_jax.search import variation
from nemo_jax.search.problem import Problem


def search(
  key: Array, problem: Problem, evaluations: int, score: Score
) -> None:
  """Scores each choice at all nodes, or the nearest that a node allows."""
  del key
  nodes, choices = problem.allowed.shape
  rows = np.tile(np.arange(choices)[:, None], (1, nodes))
  rows = variation.nearest_allowed(rows, problem.allowed)
  score(np.unique(rows, axis=0)[:evaluations])


BASELINE = Baseline(search)
