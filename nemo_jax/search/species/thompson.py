"""Thompson sampling: optima under draws from the surrogate's posterior."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from nemo_jax.core.types import Array, InputError
from nemo_jax.search import blocks, gaussian_process
from nemo_jax.search import prior as prior_lib
from nemo_jax.search.problem import Problem, Species, SpeciesBuilder


class State(NamedTuple):
  """Draws from the posterior, and the size of the species."""

  factors: Float[Array, 'D N K']  # D draws of factors on the prior's losses
  places: Int[Array, '']  # int32, rows of the population of this species


def make(
  problem: Problem,
  population_size: int,
  draws: int = 16,
  proposals: int = 256,
) -> Species:
  """Species without genotypes that samples from the surrogate's posterior.

  Factors on the prior's losses are drawn from the posterior, see
  `gaussian_process.draw_factors`. The proposals are the optima of
  `prior.cheapest` for these factors and random prices.

  Args:
    problem: the problem to search, with a prior.
    population_size: P.
    draws: D, of factors in a generation.
    proposals: proposals made in a generation, at least; P if that is larger.

  Raises:
    InputError: the problem has no prior, or one without costs; or, in `tell`,
      the search has no surrogate.
  """
  market = prior_lib.market(problem)
  number, size = blocks.divide(max(population_size, proposals))

  def init(key):
    del key
    factors = jnp.ones((draws, *problem.allowed.shape), jnp.float32)
    return State(factors, jnp.int32(0))

  def ask_all(key, state, screened):
    def propose(block):
      key, row = block
      prices = market.draw(key, size)
      return jax.vmap(market.solve)(prices, state.factors[row])

    rows = jnp.arange(number * size).reshape(number, size) % draws
    proposed = blocks.fill(
      propose,
      (blocks.keys(key, number), rows),
      blocks.num_proposals(state.places, screened),
    )
    return proposed, state

  def tell(key, state, feedback):
    if feedback.learned is None:
      raise InputError('thompson needs a surrogate, from which it learns')
    drawn = gaussian_process.draw_factors(key, problem, feedback.learned, draws)
    # If all evaluations failed, the last draws are kept.
    known = jnp.any(feedback.learned.known)
    places = jnp.sum(feedback.own, dtype=jnp.int32)
    return State(jnp.where(known, drawn, state.factors), places)

  return Species(
    init=init,
    ask=functools.partial(ask_all, screened=False),
    tell=tell,
    ask_more=functools.partial(ask_all, screened=True),
  )


BUILDER = SpeciesBuilder(make, needs_prior=True)
