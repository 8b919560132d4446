"""The same choice at every node."""

import numpy as np

from nemo_jax.arena.baseline import Baseline
from nemo_jax.search import variation


def search(key, problem, evaluations, score) -> None:
  """Every choice once, where a node does not allow it the nearest one."""
  del key
  nodes, choices = problem.allowed.shape
  rows = np.tile(np.arange(choices)[:, None], (1, nodes))
  rows = variation.nearest_allowed(rows, problem.allowed)
  score(np.unique(rows, axis=0)[:evaluations])


BASELINE = Baseline(search)
