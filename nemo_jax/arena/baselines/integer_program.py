"""The optimum of the additive estimate within budgets at random.

As NVIDIA ModelOpt's AutoQuantize and Sony's Model Compression Toolkit do for
one budget: sensitivities are added up, and an integer program finds the best
configuration by them that the budget allows.
"""

import jax
import numpy as np

from nemo_jax.arena.baseline import Baseline
from nemo_jax.search import knapsack
from nemo_jax.search import prior as prior_lib

# Budgets that are drawn for an evaluation, at most.
TRIES = 3


def search(key, problem, evaluations, score, gap: float = 1e-3) -> None:
  """One optimum for each evaluation, none twice.

  Budgets come from random points of the estimate's own front, so that all can
  be met and none is beyond use.

  Args:
    key: random key.
    problem: what is searched; it has an estimate.
    evaluations: how many it has.
    score: see `baseline.Search`.
    gap: relative to the optimum, at which a program ends.
  """
  known = prior_lib.of(problem)
  found = knapsack.groups(known, problem.allowed)
  draw = np.random.default_rng(np.asarray(jax.random.key_data(key)))
  targets = np.asarray(prior_lib.front(key, problem, TRIES * evaluations))
  rows = {}
  for target in targets:
    budget = np.asarray(prior_lib.totals(known, target))[1:]
    # Somewhere between the points that prices reach.
    budget = budget * draw.uniform(1.0, 1.1, len(budget))
    row = knapsack.optimum(found, len(target), budget, gap)
    # Nothing is paid for twice.
    rows.setdefault(row.tobytes(), row)
    if len(rows) == evaluations:
      break
  score(np.stack(list(rows.values())))


BASELINE = Baseline(search, needs_prior=True)
