"""Neuroevolution of a GCN that corrects the prior's losses, given prices."""

import jax
import jax.numpy as jnp

from nemo_jax.core.types import PyTree
from nemo_jax.search import neuroevolution, policies
from nemo_jax.search import prior as prior_lib
from nemo_jax.search.problem import Problem, Species, SpeciesBuilder


def correct(
  network: policies.GCN, problem: Problem, learned: PyTree | None = None
) -> neuroevolution.Policy:
  """Policy of a Lagrangian relaxation whose losses a network corrects.

  Prices are Lagrange multipliers of the costs, and part of the weights. The
  network reads the graph, with the logarithms of the prices as further features
  of every node, and returns the logarithm of a factor on each node's losses.
  The choices are the optimum of `prior.cheapest`. With other prices the same
  network gives other points of a front, and it can be used for other problems
  with the same features and costs. Initially all factors are one, which gives
  the front of a knapsack on the sensitivities.

  Args:
    network: a GCN with one output for each node.
    problem: the problem to search, with a prior.
    learned: weights of L networks, arrays [L, ...], from a search on a problem
      with the same features and costs. A network starts from a random one of
      them; from new weights if absent.

  Raises:
    InputError: the problem has no prior, or one without costs.
  """
  market = prior_lib.market(problem)
  graph = policies.undirected(jax.device_get(problem.graph))

  # Prices are logarithms, relative to the usual prices of this problem.
  read = lambda prices: graph._replace(globals=prices / 5)

  def start(key):
    key_prices, key_network = jax.random.split(key)
    prices = jnp.log(market.draw(key_prices, 1)[0]) - market.usual
    if learned is not None:
      count = len(jax.tree.leaves(learned)[0])
      row = jax.random.randint(key_network, (), 0, count)
      weights = jax.tree.map(lambda x: jnp.asarray(x)[row], learned)
      return {'prices': prices, 'network': weights}
    weights = network.init(key_network, read(prices))
    last = jax.tree.map(jnp.zeros_like, weights['params']['logits'])
    weights = {'params': weights['params'] | {'logits': last}}
    return {'prices': prices, 'network': weights}

  def choose(weights):
    prices = weights['prices']
    factors = jnp.asarray(network.apply(weights['network'], read(prices)))
    log_factors = factors[:, 0]
    return market.solve(
      jnp.exp(jnp.clip(prices, -20, 20) + market.usual),
      jnp.exp(jnp.clip(log_factors, -10, 10)),
    )

  return neuroevolution.Policy(start, choose)


def make(
  problem: Problem,
  population_size: int,
  algorithm: str = 'SSNE',
  hidden: int = 8,
  learned: PyTree | None = None,
) -> Species:
  """Species of networks with prices; see `correct` and `neuroevolution.make`.

  Args:
    problem: the problem to search, with a prior.
    population_size: P.
    algorithm: one of `neuroevolution.algorithms()`.
    hidden: features of the hidden layers.
    learned: see `correct`.

  Raises:
    InputError: the problem has no prior, or one without costs.
  """
  policy = correct(policies.GCN(1, hidden), problem, learned)
  return neuroevolution.make(policy, population_size, algorithm)


BUILDER = SpeciesBuilder(make, needs_prior=True)
