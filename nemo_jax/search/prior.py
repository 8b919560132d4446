"""Optimal configurations under a problem's prior, by Lagrangian relaxation.

A price is the Lagrange multiplier of a cost. For given prices, the
configuration with the least loss + prices x costs is found node by node, or by
message passing where a cost is a product of two nodes' choices. This is the
Lagrangian relaxation (Everett 1963) of the multiple-choice knapsack that MPQCO
(arXiv 2110.06554) and HAWQ-V3 solve for bit-widths. All prices together give
the convex Pareto front of the prior.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from jaxtyping import Bool, Float, Int

from nemo_jax.core.types import Array, ArrayLike, InputError
from nemo_jax.search.problem import Prior, Problem

# Most rounds of messages. Trees with longer paths are solved approximately.
MOST_ROUNDS = 8
_FORBIDDEN = 1e12  # loss of a choice that is not allowed


def is_known(problem: Problem) -> bool:
  """Whether the problem has a prior with at least one cost."""
  prior = problem.prior
  return prior is not None and np.shape(prior.costs)[-1] > 0


def of(problem: Problem) -> Prior:
  """The prior of a problem.

  Raises:
    InputError: the problem has no prior, or one without costs.
  """
  if problem.prior is None or not is_known(problem):
    raise InputError(
      'this needs an estimate of what each choice loses, and a cost among the '
      'objectives; give make_problem sensitivities'
    )
  return problem.prior


def totals(
  prior: Prior, choices: Int[ArrayLike, ' N']
) -> Float[Array, ' values']:
  """Loss and C costs of a configuration, by the prior; float32[1 + C]."""
  prior = jax.tree.map(jnp.asarray, prior)
  nodes = jnp.arange(choices.shape[0])
  left, right = choices[prior.pairs.T]
  pairs = jnp.arange(prior.pairs.shape[0])
  costs = jnp.sum(prior.costs[nodes, choices], axis=0)
  costs += jnp.sum(prior.pair_costs[pairs, left, right], axis=0)
  loss = jnp.sum(prior.loss[nodes, choices])
  return jnp.concatenate([loss[None], costs])


def spans(prior: Prior) -> Float[np.ndarray, ' C']:
  """Range of each cost over all configurations, about; float64.

  A cost that is the same everywhere has 1.
  """
  nodes = np.asarray(prior.costs, np.float64)
  pairs = np.asarray(prior.pair_costs, np.float64)
  span = np.ptp(nodes, axis=1).sum(axis=0)
  span += (pairs.max(axis=(1, 2)) - pairs.min(axis=(1, 2))).sum(axis=0)
  return np.where(span > 0, span, 1)


def hull(
  cost: Float[np.ndarray, ' n'], loss: Float[np.ndarray, ' n']
) -> list[Any]:
  """Rows on the lower convex hull, from the least cost to the least loss."""
  rows = []
  for row in np.lexsort((loss, cost)):
    if rows and loss[row] >= loss[rows[-1]]:
      continue
    # Each step along the hull gains more per cost than the next one.
    while len(rows) > 1 and gain(cost, loss, *rows[-2:]) <= gain(
      cost, loss, rows[-1], row
    ):
      rows.pop()
    rows.append(row)
  return rows


def gain(
  cost: Float[np.ndarray, ' n'], loss: Float[np.ndarray, ' n'], a: Any, b: Any
) -> Any:
  """Decrease of the loss per increase of the cost, from row a to row b."""
  return (loss[a] - loss[b]) / (cost[b] - cost[a])


def exchange_rates(prior: Prior) -> Float[np.ndarray, ' T']:
  """Gains of all steps along the convex hull of each node's choices, sorted.

  A gain is a decrease of the loss per increase of the cost; float32. The
  optimal configuration changes at about these prices. Costs are in units of
  `spans` and averaged; a pair cost is averaged over the partner's choices.
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
  """Rounds of messages for `cheapest`: the longest path along the pairs.

  At most MOST_ROUNDS.
  """
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
  prior: Prior,
  allowed: Bool[ArrayLike, 'N K'],
  prices: Float[ArrayLike, ' C'],
  factors: Float[ArrayLike, ' N'] | Float[ArrayLike, 'N K'],
  hops: int,
) -> Int[Array, ' N']:
  """Configuration with the least factors x loss + prices x costs; int32.

  By min-sum message passing (Pearl 1988). It is exact if the pairs form trees
  with paths of at most MOST_ROUNDS edges, such as an activation and the weights
  it is multiplied with; otherwise it is an approximation.

  Args:
    prior: of the problem.
    allowed: choices that the target can run.
    prices: Lagrange multiplier of each cost.
    factors: on the losses of each node, or of each of its choices.
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

  def send(messages, _):
    to_left, to_right = messages
    total = belief(messages)
    # A message leaves out what its receiver sent.
    from_left = (total[left] - to_left)[:, :, None] + joint
    from_right = (total[right] - to_right)[:, None, :] + joint
    sent = jnp.min(from_right, axis=2), jnp.min(from_left, axis=1)
    # Only differences count; without this, messages would grow in every round.
    sent = tuple(x - jnp.min(x, axis=1, keepdims=True) for x in sent)
    return sent, None

  messages, _ = jax.lax.scan(send, (silent, silent), None, length=hops)
  # Prices may outweigh _FORBIDDEN, so the choices are masked once more.
  final = jnp.where(allowed, belief(messages), jnp.inf)
  return jnp.argmin(final, axis=-1).astype(jnp.int32)


def draw_prices(
  key: Array,
  rates: Float[ArrayLike, ' T'],
  span: Float[ArrayLike, ' C'],
  count: int,
) -> Float[Array, '{count} C']:
  """Random prices that cover the whole front of the prior; float32.

  The level of the prices is drawn between two neighbouring exchange rates. It
  is then divided among the costs at random, often unevenly.

  Args:
    key: random key.
    rates: from `exchange_rates`.
    span: from `spans`.
    count: number of price vectors.
  """
  key_level, key_share = jax.random.split(key)
  place = jax.random.uniform(key_level, (count,)) * (rates.shape[0] - 1)
  index = jnp.arange(rates.shape[0])
  level = jnp.exp(jnp.interp(place, index, jnp.log(rates)))
  # Weibull numbers are as uneven as those of a Dirichlet distribution, but much
  # faster to draw.
  part = jax.random.weibull_min(key_share, 1.0, 0.7, (count, span.shape[0]))
  share = part / jnp.sum(part, axis=1, keepdims=True)
  return level[:, None] * jnp.maximum(share, 1e-6) / span


class Market(NamedTuple):
  """Lagrangian relaxation of one problem; see `draw_prices` and `cheapest`."""

  usual: Float[Array, ' C']  # logarithms of prices in the middle of the front
  draw: Callable[[Array, int], Array]  # (key, count) -> prices [count, C]
  # (prices [C], factors [N] or [N, K]) -> choices [N]
  solve: Callable[[Array, Array], Array]


def market(problem: Problem) -> Market:
  """Market of a problem; rates, spans and rounds are computed only once.

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


def front(key: Array, problem: Problem, count: int) -> Int[Array, '{count} N']:
  """Optimal configurations under the prior at random prices; int32.

  Raises:
    InputError: as for `of`.
  """
  _, draw, solve = market(problem)
  ones = jnp.ones(problem.allowed.shape[0])
  return jax.vmap(lambda prices: solve(prices, ones))(draw(key, count))
