"""MPQCO: choices by the prior alone, as a multiple-choice knapsack.

arXiv 2110.06554, section 3.3: every quantizer gets one bit-width, so that the
sum of sensitivities is minimal within budgets on the costs. BitOps are products
of two bit-widths, so nodes are put in groups: the connected components of the
prior's pairs. A choice of the knapsack is a joint choice of a whole group.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.optimize
import scipy.sparse
from jaxtyping import Bool, Float, Int, Real

from nemo_jax import pareto
from nemo_jax.core.types import ArrayLike, InputError
from nemo_jax.search import prior as prior_lib
from nemo_jax.search.problem import Prior

# Most joint choices of a group; a group with more is refused.
MOST_CHOICES = 100_000
# Relative difference that sums in another order may have.
_ROUNDING = 1e-12


class Group(NamedTuple):
  """Nodes that are connected by pairs, and their J joint choices."""

  nodes: Int[np.ndarray, ' n']
  choices: Int[np.ndarray, 'J n']
  loss: Float[np.ndarray, ' J']  # the sum over the nodes
  costs: Float[np.ndarray, 'J C']  # the sum over the nodes and their pairs


def _members(
  count: int, pairs: Int[np.ndarray, 'E 2']
) -> list[Int[np.ndarray, ' n']]:
  """Connected components of the nodes, as sorted indices."""
  ones = np.ones(len(pairs))
  links = scipy.sparse.coo_matrix((ones, pairs.T), shape=(count, count))
  _, labels = scipy.sparse.csgraph.connected_components(links, directed=False)
  return [np.flatnonzero(labels == i) for i in range(labels.max() + 1)]


def _undominated(group: Group) -> Group:
  """Group without dominated choices; of equal choices, one is kept."""
  values = np.concatenate([group.loss[:, None], group.costs], axis=1)
  keep, kept = [], np.empty((0, values.shape[1]))
  for row in np.lexsort(values.T[::-1]):
    if not np.any(np.all(kept <= values[row], axis=1)):
      keep.append(row)
      kept = np.concatenate([kept, values[row : row + 1]])
  keep = np.sort(keep)
  return Group(group.nodes, *(column[keep] for column in group[1:]))


def _joint(
  nodes: Int[np.ndarray, ' n'], allowed: Bool[np.ndarray, 'N K']
) -> Int[np.ndarray, 'J n']:
  """All joint choices that the nodes of a group are allowed."""
  options = [np.flatnonzero(allowed[n]) for n in nodes]
  if math.prod(map(len, options)) > MOST_CHOICES:
    raise InputError(
      f'{len(nodes)} nodes are in pairs with each other, which is too many '
      'joint choices; give fewer choices'
    )
  return np.asarray(list(itertools.product(*options)))


def groups(
  prior: Prior, allowed: Bool[ArrayLike, 'N K'] | None = None
) -> list[Group]:
  """Groups of a problem, each with its non-dominated joint choices.

  Args:
    prior: of the problem.
    allowed: choices that the target can run; all if absent.

  Raises:
    InputError: a node is allowed no choice, or a group has too many joint
      choices.
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
  found: Sequence[Group], count: int, weights: Real[ArrayLike, ' C'] | Sequence
) -> Int[np.ndarray, 'P N']:
  """Configurations from the cheapest to the one with the least loss; int32.

  It starts with the cheapest choice of every group. Each step goes along the
  convex hull of one group's choices, and lowers the loss the most per cost.
  Each configuration on the way has the least loss for its cost, also among
  mixtures of choices (the linear relaxation of the knapsack).

  Args:
    found: from `groups`.
    count: N.
    weights: of each cost in the weighted cost of a step.
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


def front(
  found: Sequence[Group], count: int, shares: int = 11
) -> Int[np.ndarray, 'P N']:
  """Configurations of `greedy` for a grid of weights, each once; int32.

  Args:
    found: from `groups`.
    count: N.
    shares: number of weights from 0 to 1 that each cost gets, see
      `pareto.reference_directions`. Weights are in units of each cost's range.
  """
  span = sum(np.ptp(group.costs, axis=0) for group in found)
  directions = pareto.reference_directions(len(span), shares - 1)
  weights = directions / np.where(span > 0, span, 1)
  rows = [greedy(found, count, row) for row in weights]
  return np.unique(np.concatenate(rows), axis=0)


def totals(
  found: Sequence[Group], choices: Int[np.ndarray, 'P N']
) -> Float[np.ndarray, 'P values']:
  """Loss and C costs of each configuration; float64[P, 1 + C].

  Raises:
    InputError: a configuration has a joint choice that is not in `found`,
      because it is dominated or not allowed.
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


def _least(
  excess: Float[np.ndarray, ' J'],
  owner: Int[np.ndarray, ' J'],
  costs: Float[np.ndarray, 'C J'],
  budgets: Float[np.ndarray, ' C'],
  gap: float,
) -> Bool[np.ndarray, ' J'] | None:
  """Mask of one choice per group with the least sum; None if there is none.

  The solver stops within 1e-6 of the optimum, an absolute tolerance. It is
  therefore run again with losses in units of the optimum that it found, and
  without the choices whose own excess is above it, until the unit fits. Its
  tolerance on budgets is as loose; where one is exceeded, it is run again with
  a smaller budget.

  Args:
    excess: loss of each choice above the least of its group.
    owner: group of each choice.
    costs: of each choice.
    budgets: of each cost.
    gap: relative gap to the optimum at which the solver stops.
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
  budgets: Float[ArrayLike, ' C'] | Sequence,
  gap: float = 1e-6,
) -> Int[np.ndarray, ' N']:
  """Configuration with the least loss within budgets; int32.

  By integer programming (HiGHS).

  Args:
    found: from `groups`.
    count: N.
    budgets: the most of each cost of the prior; infinity for no limit. A
      configuration within a few millionths of a budget may be missed.
    gap: relative gap to the optimum at which the solver stops.

  Raises:
    InputError: no configuration meets the budgets.
  """
  owner = np.repeat(np.arange(len(found)), [len(g.loss) for g in found])
  costs = np.concatenate([group.costs for group in found])
  unit = np.max(np.abs(costs), axis=0)
  unit = np.where(unit > 0, unit, 1)
  # Losses above the least of each group; the least ones are a constant.
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
