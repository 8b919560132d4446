"""EvoPress (Sieberling et al. 2024): a (1 + lambda) search within a budget.

Offspring of a configuration raise some nodes by one choice and lower others
until they are within the budget of cost; the best replaces its parent if it is
no worse. Searches with random budgets make a front.
"""

import itertools
from collections.abc import Callable

import jax
import numpy as np

from nemo_jax.arena.baseline import Baseline, Score
from nemo_jax.core.types import Array
from nemo_jax.search import prior as prior_lib
from nemo_jax.search.problem import Problem

# It uses the costs of the prior, which are exact, and not the sensitivities.


def _cost_of(
  problem: Problem, shares: np.ndarray
) -> Callable[[np.ndarray], float]:
  """Function from int[N] to its weighted cost; shares [C] are of the spans."""
  known = prior_lib.of(problem)
  prices = shares / prior_lib.spans(known)
  own, joint = np.asarray(known.costs) @ prices, known.pair_costs @ prices
  left, right = np.asarray(known.pairs).T
  nodes, pairs = np.arange(len(own)), np.arange(len(left))

  def cost(row: np.ndarray) -> float:
    return own[nodes, row].sum() + joint[pairs, row[left], row[right]].sum()

  return cost


def _nearest_below(allowed: np.ndarray) -> np.ndarray:
  """int[N, K]: the next narrower choice of a node; the same if none is."""
  table = np.tile(np.arange(allowed.shape[1]), (len(allowed), 1))
  for node, options in enumerate(allowed):
    for low, high in itertools.pairwise(np.flatnonzero(options)):
      table[node, high] = low
  return table


def _switch(
  draw: np.random.Generator,
  row: np.ndarray,
  below: np.ndarray,
  above: np.ndarray,
  fits: Callable[[np.ndarray], bool],
) -> np.ndarray:
  """The row int[N] with nodes raised, and others lowered until it fits."""
  child, nodes = row.copy(), np.arange(len(row))
  for node in draw.integers(len(row), size=draw.integers(1, 4, 2).min()):
    child[node] = above[node, child[node]]
  while not fits(child) and np.any(below[nodes, child] < child):
    node = draw.integers(len(row))
    child[node] = below[node, child[node]]
  return child


def search(
  key: Array,
  problem: Problem,
  evaluations: int,
  score: Score,
  offspring: int = 4,
  generations: int = 10,
) -> None:
  """Searches with random budgets until the evaluations are used.

  Args:
    key: random key.
    problem: that is searched; its prior has the costs.
    evaluations: budget.
    score: see `baseline.Search`.
    offspring: lambda.
    generations: of each search.
  """
  draw = np.random.default_rng(np.asarray(jax.random.key_data(key)))
  allowed = np.asarray(problem.allowed)
  below = _nearest_below(allowed)
  above = allowed.shape[1] - 1 - _nearest_below(allowed[:, ::-1])[:, ::-1]
  narrow = np.argmax(allowed, axis=1)
  wide = allowed.shape[1] - 1 - np.argmax(allowed[:, ::-1], axis=1)
  priced = prior_lib.of(problem).costs.shape[-1]
  while evaluations > 0:
    cost = _cost_of(problem, draw.dirichlet(np.ones(priced)))
    least, most = cost(narrow), cost(wide)
    budget = least + draw.uniform() * (most - least)
    fits = lambda row, cost=cost, budget=budget: cost(row) <= budget * 1.000001
    parent, best = wide, None
    for generation in range(generations + 1):
      count = min(offspring if generation else 1, evaluations)
      if not count:
        return
      children = np.stack(
        [_switch(draw, parent, below, above, fits) for _ in range(count)]
      )
      losses = np.asarray(score(children))[:, 0]
      evaluations -= count
      if best is None or losses.min() <= best:
        parent, best = children[losses.argmin()], losses.min()


BASELINE = Baseline(search)
