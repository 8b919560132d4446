"""Evolved Lagrange multipliers of the costs and factors on the losses."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from nemo_jax.core.types import Array
from nemo_jax.search import blocks, variation
from nemo_jax.search import prior as prior_lib
from nemo_jax.search.problem import Problem, Species, SpeciesBuilder


class Genotype(NamedTuple):
  """Parameters of the Lagrangian relaxation; see `prior.cheapest`."""

  log_prices: Float[Array, '*s C']  # of the Lagrange multipliers of the costs
  log_factors: Float[Array, '*s N']  # on the prior's losses at each node


class State(NamedTuple):
  """Parents, one for each row of the population, and the last offspring."""

  parents: Genotype  # [P, ...] each
  offspring: Genotype  # [Q, ...] each
  rank: Float[Array, ' P']  # +inf in rows of other species
  own: Bool[Array, ' P']  # the rows of this species


def make(
  problem: Problem,
  population_size: int,
  fresh_rate: float = 0.5,
  crossover_rate: float = 0.5,
  price_std: float = 0.3,
  factor_std: float = 0.7,
  factor_rate: float = 0.1,
  proposals: int = 256,
) -> Species:
  """Species of Lagrangian relaxations of the prior, with corrected losses.

  A genotype is a price, the Lagrange multiplier of each cost, and a factor on
  the prior's losses at each node. Its configuration is the optimum of
  `prior.cheapest`. The first generation has factors of one and random prices:
  the front of a knapsack on the sensitivities.

  Args:
    problem: the problem to search, with a prior.
    population_size: P.
    fresh_rate: share of the offspring with new, random prices and inherited
      factors; in the others, both are mutated.
    crossover_rate: share of the offspring that have two parents.
    price_std: of the noise on the logarithms of inherited prices.
    factor_std: of the noise on the logarithms of factors.
    factor_rate: share of the factors that are mutated.
    proposals: proposals made in a generation, at least; P if that is larger.

  Raises:
    InputError: the problem has no prior, or one without costs.
  """
  market = prior_lib.market(problem)
  nodes = problem.allowed.shape[0]
  number, size = blocks.divide(max(population_size, proposals))
  count = number * size

  def fresh(key, count=size):
    factors = jnp.zeros((count, nodes), jnp.float32)
    return Genotype(jnp.log(market.draw(key, count)), factors)

  def init(key):
    return State(
      parents=fresh(key, population_size),
      offspring=fresh(key, count),
      rank=jnp.full(population_size, jnp.inf, jnp.float32),
      own=jnp.zeros(population_size, bool),
    )

  def breed(key, state):
    keys = jax.random.split(key, 8)
    one, two = (
      jax.tree.map(
        lambda x, k=k: x[variation.tournament(k, state.rank, state.own, size)],
        state.parents,
      )
      for k in keys[:2]
    )
    crossed = jax.random.bernoulli(keys[2], crossover_rate, (size, 1))
    crossed &= variation.coins(keys[3], one.log_factors.shape)
    factors = jnp.where(crossed, two.log_factors, one.log_factors)
    noise = variation.sparse_normal(keys[4], factor_rate, factors.shape)
    prices = one.log_prices
    prices += price_std * jax.random.normal(keys[5], prices.shape)
    renewed = jax.random.bernoulli(keys[7], fresh_rate, (size, 1))
    prices = jnp.where(renewed, fresh(keys[6]).log_prices, prices)
    factors += jnp.where(renewed, 0, factor_std * noise)
    return Genotype(prices, factors)

  def propose(state, key):
    child = jax.lax.cond(
      jnp.any(state.own), breed, lambda key, _: fresh(key), key, state
    )
    return jax.vmap(market.solve)(*map(jnp.exp, child)), child

  def tell(key, state, feedback):
    del key
    parents = variation.survivors(
      state.parents, state.offspring, feedback.source
    )
    return state._replace(
      parents=parents,
      rank=jnp.where(feedback.own, feedback.rank, jnp.inf),
      own=feedback.own,
    )

  return Species(
    init=init,
    tell=tell,
    **blocks.asks(propose, number),
  )


BUILDER = SpeciesBuilder(make, needs_prior=True)
