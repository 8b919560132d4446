"""Integer programs: least sums of sensitivities within random budgets.

NVIDIA ModelOpt's AutoQuantize and Sony's Model Compression Toolkit do this for
one budget: the loss is the sum of sensitivities, and an integer program finds
the configuration with the least loss within the budget.
"""

import jax
import numpy as np

from nemo_jax.arena.baseline import Baseline, Score
from nemo_jax.core.types import Array
from nemo_jax.search import knapsack
from nemo_jax.search import prior as prior_lib
from nemo_jax.search.problem import Problem

# Most budgets that are drawn for an evaluation.
TRIES = 3


def search(
  key: Array,
  problem: Problem,
  evaluations: int,
  score: Score,
  gap: float = 1e-3,
) -> None:
  """Scores one optimum for each evaluation, and none twice.

  Budgets are the costs of random points on the front of the prior, increased by
  up to a tenth. There are configurations within each of them, and each of them
  limits the choice.

  Args:
    key: random key.
    problem: that is searched, with a prior.
    evaluations: budget.
    score: see `baseline.Search`.
    gap: relative gap to the optimum at which a program ends.
  """
  known = prior_lib.of(problem)
  found = knapsack.groups(known, problem.allowed)
  draw = np.random.default_rng(np.asarray(jax.random.key_data(key)))
  targets = np.asarray(prior_lib.front(key, problem, TRIES * evaluations))
  rows = {}
  for target in targets:
    budget = np.asarray(prior_lib.totals(known, target))[1:]
    # Budgets between the points that Lagrange multipliers reach.
    budget = budget * draw.uniform(1.0, 1.1, len(budget))
    row = knapsack.optimum(found, len(target), budget, gap)
    # No configuration is scored twice.
    rows.setdefault(row.tobytes(), row)
    if len(rows) == evaluations:
      break
  score(np.stack(list(rows.values())))


BASELINE = Baseline(search, needs_prior=True)
