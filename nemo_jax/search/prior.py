"""An additive estimate of the objectives, and what is best by it at a price.

With a price on every cost the best configuration is found node by node, or pair
by pair where a cost is a product of two choices: Lagrangian relaxation of the
multiple-choice knapsack (Everett 1963), as MPQCO (arXiv 2110.06554) and HAWQ-V3
solve for bit-widths. All prices together give the convex front of the prior.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse

from nemo_jax.core.types import Array, ArrayLike, InputError
from nemo_jax.search.problem import Prior, Problem

# Messages go no further than this: enough for trees that are as far across.
MOST_ROUNDS = 8
_FORBIDDEN = 1e12


def is_known(problem: Problem) -> bool:
  """Whether there is a prior, with a cost to put a price on."""
  prior = problem.prior
  return prior is not None and np.shape(prior.costs)[-1] > 0


def of(problem: Problem) -> Prior:
  """The prior of a problem.

  Raises:
    InputError: it has none, or one without costs.
  """
  if problem.prior is None or not is_known(problem):
    raise InputError(
      'this needs an estimate of what each choice loses, and a cost among the '
      'objectives; give make_problem sensitivities'
    )
  return problem.prior


def totals(prior: Prior, choices: Array) -> Array:
  """float32[1 + C]: loss and costs of a configuration [N], by the prior."""
  prior = jax.tree.map(jnp.asarray, prior)
  nodes = jnp.arange(choices.shape[0])
  left, right = choices[prior.pairs.T]
  pairs = jnp.arange(prior.pairs.shape[0])
  costs = jnp.sum(prior.costs[nodes, choices], axis=0)
  costs += jnp.sum(prior.pair_costs[pairs, left, right], axis=0)
  loss = jnp.sum(prior.loss[nodes, choices])
  return jnp.concatenate([loss[None], costs])


def spans(prior: Prior) -> np.ndarray:
  """float64[C]: about what each cost differs by over all configurations."""
  nodes = np.asarray(prior.costs, np.float64)
  pairs = np.asarray(prior.pair_costs, np.float64)
  span = np.ptp(nodes, axis=1).sum(axis=0)
  span += (pairs.max(axis=(1, 2)) - pairs.min(axis=(1, 2))).sum(axis=0)
  return np.where(span > 0, span, 1)


def hull(cost: np.ndarray, loss: np.ndarray) -> list[int]:
  """Rows of the lower convex hull, from the cheapest to the least loss."""
  rows = []
  for row in np.lexsort((loss, cost)):
    if rows and loss[row] >= loss[rows[-1]]:
      continue
    # A step gains more for its cost than the next.
    while len(rows) > 1 and gain(cost, loss, *rows[-2:]) <= gain(
      cost, loss, rows[-1], row
    ):
      rows.pop()
    rows.append(row)
  return rows


def gain(cost: np.ndarray, loss: np.ndarray, a: int, b: int) -> float:
  """How much less is lost for each unit of cost, from row a to row b."""
  return (loss[a] - loss[b]) / (cost[b] - cost[a])


def exchange_rates(prior: Prior) -> np.ndarray:
  """float32[T]: loss for cost of all steps that are worth taking, sorted.

  They are those along the convex hull of each node's choices: about the prices
  at which something changes. Costs are in units of `spans`, and averaged; a
  partner in a pair is taken at the mean of its choices.
  """
  span = spans(prior)
  costs = np.asarray(prior.costs, np.float64).copy()
  pair_costs = np.asarray(prior.pair_costs, np.float64)
  for side, axis in ((0, 2), (1, 1)):
    nodes = np.asarray(prior.pairs)[:, side]
    np.add.at(costs, nodes, pair_costs.mean(axis=axis))
  rates = []
  for cost, loss in zip(
    (costs / span).mean(axis=-1),
    np.asarray(prior.loss, np.float64),
    strict=True,
  ):
    steps = itertools.pairwise(hull(cost, loss))
    rates += [gain(cost, loss, *step) for step in steps]
  return np.sort(rates or [1.0]).astype(np.float32)


def rounds(prior: Prior) -> int:
  """How often nodes have to hear from each other in `cheapest`."""
  count, pairs = len(prior.loss), np.asarray(prior.pairs)
  if not len(pairs):
    return 0
  links = scipy.sparse.coo_matrix(
    (np.ones(len(pairs)), pairs.T), shape=(count, count)
  )
  steps = scipy.sparse.csgraph.shortest_path(
    links, directed=False, unweighted=True
  )
  return min(int(steps[np.isfinite(steps)].max()), MOST_ROUNDS)


def cheapest(
  prior: Prior, allowed: ArrayLike, prices: Array, factors: Array, hops: int
) -> Array:
  """int32[N]: the least of factors x loss + prices x costs, over all choices.

  By min-sum message passing (Pearl 1988), which is exact where the pairs form
  trees of at most MOST_ROUNDS across, as an activation and the weights that it
  meets do; elsewhere it is an approximation.

  Args:
    prior: of the problem.
    allowed: bool[N, K].
    prices: float32[C].
    factors: float32[N] or [N, K], of the losses at each node.
    hops: rounds of messages, from `rounds`.
  """
  prior = jax.tree.map(jnp.asarray, prior)
  own = factors.reshape(len(factors), -1) * prior.loss
  own += prior.costs @ prices
  own = jnp.where(allowed, own, _FORBIDDEN)
  left, right = prior.pairs.T
  joint = prior.pair_costs @ prices  # [E, K, K]
  silent = jnp.zeros(joint.shape[:2])

  def belief(messages):
    to_left, to_right = messages
    return own.at[left].add(to_left).at[right].add(to_right)

  def tell(messages, _):
    to_left, to_right = messages
    heard = belief(messages)
    # What a node heard from the other it does not tell it.
    from_left = (heard[left] - to_left)[:, :, None] + joint
    from_right = (heard[right] - to_right)[:, None, :] + joint
    told = jnp.min(from_right, axis=2), jnp.min(from_left, axis=1)
    # Only differences count; without this they would grow with every round.
    told = tuple(x - jnp.min(x, axis=1, keepdims=True) for x in told)
    return told, None

  messages, _ = jax.lax.scan(tell, (silent, silent), None, length=hops)
  # Whatever the prices, nothing is chosen that is not allowed.
  final = jnp.where(allowed, belief(messages), jnp.inf)
  return jnp.argmin(final, axis=-1).astype(jnp.int32)


def draw_prices(
  key: Array, rates: ArrayLike, span: ArrayLike, count: int
) -> Array:
  """float32[count, C]: prices at random, such that all of a front is met.

  Their mean level is one of the rates at which something changes, between two
  of them at random; it is divided among the costs at random, often unevenly.

  Args:
    key: random key.
    rates: from `exchange_rates`.
    span: from `spans`.
    count: of prices.
  """
  key_level, key_share = jax.random.split(key)
  place = jax.random.uniform(key_level, (count,)) * (rates.shape[0] - 1)
  index = jnp.arange(rates.shape[0])
  level = jnp.exp(jnp.interp(place, index, jnp.log(rates)))
  # Weibull numbers are as uneven as those of a Dirichlet distribution, which
  # take as long to draw as all that is done with them.
  part = jax.random.weibull_min(key_share, 1.0, 0.7, (count, span.shape[0]))
  share = part / jnp.sum(part, axis=1, keepdims=True)
  return level[:, None] * jnp.maximum(share, 1e-6) / span


class Market(NamedTuple):
  """What prices do to the choices of one problem."""

  usual: Array  # float32[C], logarithms of prices in the middle of the front
  draw: Callable[[Array, int], Array]  # (key, count) -> prices [count, C]
  solve: Callable[[Array, Array], Array]
  # (prices [C], factors [N] or [N, K]) -> choices [N], see `cheapest`


def market(problem: Problem) -> Market:
  """The market of a problem; what it needs is computed here, once.

  Raises:
    InputError: as for `of`.
  """
  known = of(problem)
  rates, span, hops = exchange_rates(known), spans(known), rounds(known)
  return Market(
    usual=jnp.asarray(np.log(rates).mean() - np.log(span), jnp.float32),
    draw=lambda key, count: draw_prices(key, rates, span, count),
    solve=lambda prices, factors: cheapest(
      known, problem.allowed, prices, factors, hops
    ),
  )


def front(key: Array, problem: Problem, count: int) -> Array:
  """int32[count, N]: what is cheapest by the prior, at prices at random.

  Raises:
    InputError: as for `of`.
  """
  _, draw, solve = market(problem)
  ones = jnp.ones(problem.allowed.shape[0])
  return jax.vmap(lambda prices: solve(prices, ones))(draw(key, count))
