"""MPQCO: choices by an estimate alone, as a multiple-choice knapsack.

arXiv 2110.06554, section 3.3: every quantizer takes one width, the sum of
sensitivities is to be small within budgets. Bit-operations are products of two
widths, so the choices are taken in groups: nodes that are in a pair with each
other, directly or through a third, choose together.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.optimize
import scipy.sparse

from nemo_jax import pareto
from nemo_jax.core.types import InputError
from nemo_jax.search import prior as prior_lib
from nemo_jax.search.problem import Prior

# A group of more joint choices is not enumerated.
MOST_CHOICES = 100_000
# What sums in another order may differ by, as a share.
_ROUNDING = 1e-12


class Group(NamedTuple):
  """Nodes that choose together, and what each of J joint choices costs."""

  nodes: np.ndarray  # [n]
  choices: np.ndarray  # [J, n]
  loss: np.ndarray  # [J], the sum of what their choices lose
  costs: np.ndarray  # [J, C]


def _members(count: int, pairs: np.ndarray) -> list[np.ndarray]:
  """The connected components of the nodes, by pairs."""
  ones = np.ones(len(pairs))
  links = scipy.sparse.coo_matrix((ones, pairs.T), shape=(count, count))
  _, labels = scipy.sparse.csgraph.connected_components(links, directed=False)
  return [np.flatnonzero(labels == i) for i in range(labels.max() + 1)]


def _undominated(group: Group) -> Group:
  """Without the choices that another beats or equals in everything."""
  values = np.concatenate([group.loss[:, None], group.costs], axis=1)
  keep, kept = [], np.empty((0, values.shape[1]))
  for row in np.lexsort(values.T[::-1]):
    if not np.any(np.all(kept <= values[row], axis=1)):
      keep.append(row)
      kept = np.concatenate([kept, values[row : row + 1]])
  keep = np.sort(keep)
  return Group(group.nodes, *(column[keep] for column in group[1:]))


def _joint(nodes: np.ndarray, allowed: np.ndarray) -> np.ndarray:
  """int[J, n]: all that the nodes of a group may choose together."""
  options = [np.flatnonzero(allowed[n]) for n in nodes]
  if math.prod(map(len, options)) > MOST_CHOICES:
    raise InputError(
      f'{len(nodes)} nodes are in pairs with each other, which is too many '
      'joint choices; give fewer choices'
    )
  return np.asarray(list(itertools.product(*options)))


def groups(prior: Prior, allowed: np.ndarray | None = None) -> list[Group]:
  """The groups of a problem, each with its choices that none dominates.

  Args:
    prior: of the problem.
    allowed: bool[N, K], what the target can run; everything if absent.

  Raises:
    InputError: a node is allowed nothing, or too many nodes hang together.
  """
  loss, costs, pair_costs = (
    np.asarray(x, np.float64)
    for x in (prior.loss, prior.costs, prior.pair_costs)
  )
  allowed = np.asarray(
    np.ones(loss.shape) if allowed is None else allowed, bool
  )
  barred = np.flatnonzero(~np.any(allowed, axis=1))
  if len(barred):
    raise InputError(f'allowed leaves node {barred[0]} no choice')
  found, pairs = [], np.asarray(prior.pairs)
  for nodes in _members(len(loss), pairs):
    choices = _joint(nodes, allowed)
    total = costs[nodes, choices].sum(axis=1)
    own = np.isin(pairs[:, 0], nodes)
    ends = np.searchsorted(nodes, pairs[own])
    for (one, two), joint in zip(ends, pair_costs[own], strict=True):
      total += joint[choices[:, one], choices[:, two]]
    group = Group(nodes, choices, loss[nodes, choices].sum(axis=1), total)
    found.append(_undominated(group))
  return found


def greedy(
  found: Sequence[Group], count: int, weights: Sequence[float]
) -> np.ndarray:
  """int32[P, N]: a front, from the cheapest configuration to the dearest.

  From the cheapest choice of every group, the step is taken that gains most
  for its cost, until none gains; each state on the way is a configuration, and
  the best there is for its cost and for all mixtures of choices.

  Args:
    found: from `groups`.
    count: N.
    weights: [C], of the costs in what a step costs.
  """
  steps, row = [], np.zeros(count, np.int32)
  for index, group in enumerate(found):
    cost = group.costs @ np.asarray(weights)
    hull = prior_lib.hull(cost, group.loss)
    row[group.nodes] = group.choices[hull[0]]
    for a, b in itertools.pairwise(hull):
      steps.append((prior_lib.gain(cost, group.loss, a, b), index, b))
  rows = [row]
  # Gains fall along a hull, so the steps of a group stay in their order.
  for _, index, choice in sorted(steps, reverse=True):
    row = row.copy()
    row[found[index].nodes] = found[index].choices[choice]
    rows.append(row)
  return np.stack(rows)


def front(found: Sequence[Group], count: int, shares: int = 11) -> np.ndarray:
  """int32[P, N]: `greedy` for many weights, each configuration once.

  Args:
    found: from `groups`.
    count: N.
    shares: how many weights a cost is given, from 0 to all; costs are in units
      of what they differ by.
  """
  span = sum(np.ptp(group.costs, axis=0) for group in found)
  directions = pareto.reference_directions(len(span), shares - 1)
  weights = directions / np.where(span > 0, span, 1)
  rows = [greedy(found, count, row) for row in weights]
  return np.unique(np.concatenate(rows), axis=0)


def totals(found: Sequence[Group], choices: np.ndarray) -> np.ndarray:
  """float64[P, 1 + C]: loss and costs of configurations [P, N].

  Raises:
    InputError: a configuration takes what another choice dominates.
  """
  out = np.zeros((len(choices), 1 + found[0].costs.shape[1]))
  for group in found:
    same = choices[:, None, group.nodes] == group.choices[None]
    same = np.all(same, axis=-1)
    if not np.all(np.any(same, axis=1)):
      raise InputError('a configuration is not among the choices of the groups')
    row = np.argmax(same, axis=1)
    out[:, 0] += group.loss[row]
    out[:, 1:] += group.costs[row]
  return out


def _least(excess, owner, costs, budgets, gap: float) -> np.ndarray | None:
  """bool[J]: one choice a group for the least sum; None if nothing is left.

  The solver ends once it is within 1e-6 of the optimum, in whatever units. So
  it starts again in units of what it found, without the choices that lose more
  than that by themselves, until the units fit. It takes budgets as loosely, and
  starts again with less where one was exceeded.

  Args:
    excess: [J], what a choice loses more than the best of its group.
    owner: [J], the group of a choice.
    costs: [C, J].
    budgets: [C].
    gap: relative to the optimum.
  """
  one_each = np.equal.outer(np.unique(owner), owner)
  one_each = scipy.optimize.LinearConstraint(
    scipy.sparse.csr_array(one_each, dtype=float), 1, 1
  )
  unit, best = np.max(excess) or 1.0, None
  margin = np.zeros(len(budgets))
  while True:
    solved = scipy.optimize.milp(
      excess / unit,
      integrality=np.ones(len(excess)),
      bounds=scipy.optimize.Bounds(0, excess <= unit),
      constraints=[
        one_each,
        scipy.optimize.LinearConstraint(costs, -np.inf, budgets - margin),
      ],
      options={'mip_rel_gap': gap},
    )
    if solved.x is None:
      return best
    taken = solved.x > 0.5
    over = costs @ taken - budgets
    if np.any(over > _ROUNDING * (1 + np.abs(budgets))):
      margin = np.where(over > 0, np.maximum(2 * over, 4 * margin), margin)
      continue
    best, total = taken, np.sum(excess[taken])
    if total == 0 or total > unit / 10:
      return best
    unit = total


def optimum(
  found: Sequence[Group],
  count: int,
  budgets: Sequence[float],
  gap: float = 1e-6,
) -> np.ndarray:
  """int32[N]: the least loss within budgets, by integer programming (HiGHS).

  Args:
    found: from `groups`.
    count: N.
    budgets: [C], of the costs in the estimate; infinity for none. What comes
      within a few millionths of one may be passed over.
    gap: relative to the optimum, at which the search ends.

  Raises:
    InputError: the budgets cannot be met.
  """
  owner = np.repeat(np.arange(len(found)), [len(g.loss) for g in found])
  costs = np.concatenate([group.costs for group in found])
  unit = np.max(np.abs(costs), axis=0)
  unit = np.where(unit > 0, unit, 1)
  # What a group loses at best is lost in any case.
  excess = np.concatenate([g.loss - np.min(g.loss) for g in found])
  limits = np.asarray(budgets, np.float64) / unit
  taken = _least(excess, owner, (costs / unit).T, limits, gap)
  if taken is None:
    raise InputError(f'no configuration has costs of at most {list(budgets)}')
  row = np.zeros(count, np.int32)
  for index, group in enumerate(found):
    (choice,) = np.flatnonzero(taken[owner == index])
    row[group.nodes] = group.choices[choice]
  return row
