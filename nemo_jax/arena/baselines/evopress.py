"""A (1 + lambda) search that switches levels at a fixed cost.

EvoPress (Sieberling et al. 2024): from a configuration within a budget,
offspring raise some nodes by a level and lower others until the budget holds;
the best one replaces its parent. A sweep over budgets makes a front.
"""

import itertools

import jax
import numpy as np

from nemo_jax.arena.baseline import Baseline
from nemo_jax.search import prior as prior_lib

# It reads what configurations cost, which is known, and not what they lose.


def _cost_of(problem, shares):
  """The function row [N] -> its costs in units of their spans, by shares."""
  known = prior_lib.of(problem)
  prices = shares / prior_lib.spans(known)
  own, joint = np.asarray(known.costs) @ prices, known.pair_costs @ prices
  left, right = np.asarray(known.pairs).T
  nodes, pairs = np.arange(len(own)), np.arange(len(left))

  def cost(row):
    return own[nodes, row].sum() + joint[pairs, row[left], row[right]].sum()

  return cost


def _nearest_below(allowed):
  """int[N, K]: the next narrower choice that a node allows, or its own."""
  table = np.tile(np.arange(allowed.shape[1]), (len(allowed), 1))
  for node, options in enumerate(allowed):
    for low, high in itertools.pairwise(np.flatnonzero(options)):
      table[node, high] = low
  return table


def _switch(draw, row, below, above, fits):
  """The row with some nodes raised, and others lowered until it fits."""
  child, nodes = row.copy(), np.arange(len(row))
  for node in draw.integers(len(row), size=draw.integers(1, 4, 2).min()):
    child[node] = above[node, child[node]]
  while not fits(child) and np.any(below[nodes, child] < child):
    node = draw.integers(len(row))
    child[node] = below[node, child[node]]
  return child


def search(
  key, problem, evaluations, score, offspring: int = 4, generations: int = 10
) -> None:
  """As many sweeps as there are evaluations for.

  Args:
    key: random key.
    problem: what is searched; it has an estimate, for the costs in it.
    evaluations: how many it has.
    score: see `baseline.Search`.
    offspring: lambda.
    generations: of one budget.
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
