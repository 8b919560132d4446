"""A GCN that corrects the sensitivities, given prices; its weights evolved."""

import jax
import jax.numpy as jnp

from nemo_jax.core.types import PyTree
from nemo_jax.search import neuroevolution, policies
from nemo_jax.search import prior as prior_lib
from nemo_jax.search.problem import Problem, Species, SpeciesBuilder

# Of what a problem may lack; see `prior_lib.of`.
NEEDS_ESTIMATE = True


def correct(
  network: policies.GCN, problem: Problem, learned: PyTree | None = None
) -> neuroevolution.Policy:
  """What is cheapest once a network has corrected the estimated losses.

  The network reads the graph with the logarithms of the prices at every node,
  and gives each node the logarithm of a factor on its losses. One network so is
  a whole front, and serves other problems with the same features and costs. It
  begins with factors of one, which is the knapsack's front.

  Args:
    network: with one output a node.
    problem: what is searched; it has an estimate.
    learned: weights of networks, [L, ...] each, from a search on a problem with
      the same features and costs; one of them, at random, is where a network
      begins.

  Raises:
    InputError: the problem has no estimate.
  """
  market = prior_lib.market(problem)
  graph = policies.undirected(jax.device_get(problem.graph))

  # Prices are logarithms, in units of what is usual for this problem.
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
  """A species of networks and prices; see `correct`, also for `learned`.

  Raises:
    InputError: the problem has no estimate.
  """
  policy = correct(policies.GCN(1, hidden), problem, learned)
  return neuroevolution.make(policy, population_size, algorithm)


BUILDER = SpeciesBuilder(make, needs_prior=True)
