"""A problem whose prior is the truth: wider loses less and costs more."""

import numpy as np

from nemo_jax.search import prior as prior_lib
from nemo_jax.search.problem import Prior, Problem
from tests.placement import placement_problem


def additive_problem(nodes: int = 12) -> Problem:
  """An even number of nodes, two in a pair; five choices; two costs."""
  rng = np.random.default_rng(0)
  widths = np.arange(2, 7, dtype=np.float32)
  pairs = np.arange(nodes).reshape(-1, 2)
  costs = np.zeros((nodes, 5, 2), np.float32)
  costs[::2, :, 0] = np.outer(rng.exponential(size=nodes // 2), widths)
  pair_costs = np.zeros((len(pairs), 5, 5, 2), np.float32)
  work = rng.exponential(size=(len(pairs), 1, 1))
  pair_costs[..., 1] = work * np.outer(widths, widths)
  known = Prior(
    loss=np.outer(rng.lognormal(0, 2, nodes), 4.0**-widths).astype(np.float32),
    costs=costs,
    pairs=pairs,
    pair_costs=pair_costs,
  )
  most = (
    prior_lib.totals(known, np.full(nodes, 4))
    .at[0]
    .set(prior_lib.totals(known, np.zeros(nodes, int))[0])
  )
  return placement_problem(nodes).replace(
    data=known,
    evaluate=prior_lib.totals,
    allowed=np.ones((nodes, 5), bool),
    ideal=np.zeros(3, np.float32),
    reference=most,
    prior=known,
  )
