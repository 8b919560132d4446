"""The estimate, corrected by all that was measured, at prices at random."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nemo_jax.core.types import Array, InputError
from nemo_jax.search import blocks, surrogate
from nemo_jax.search import prior as prior_lib
from nemo_jax.search.problem import Problem, Species, SpeciesBuilder

# Of what a problem may lack; see `prior_lib.of`.
NEEDS_ESTIMATE = True


class State(NamedTuple):
  """What the species believes, and how much it has to propose."""

  factors: Array  # [D, N, K] float32, draws of factors on estimated losses
  places: Array  # int32[], of the population, that are this species' own


def make(
  problem: Problem,
  population_size: int,
  draws: int = 16,
  proposals: int = 256,
) -> Species:
  """A species without genotypes: what a surrogate believes to be the front.

  Thompson sampling: factors on the estimated losses are drawn from what the
  surrogate has learned (see `surrogate.draw_factors`), and what is cheapest by
  each draw is proposed, at prices at random.

  Args:
    problem: what is searched; it has an estimate.
    population_size: P.
    draws: of factors in a generation.
    proposals: Q, how many it makes; P if that is more.

  Raises:
    InputError: the problem has no estimate; or, when it is told, the search no
      surrogate.
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
    drawn = surrogate.draw_factors(key, problem, feedback.learned, draws)
    # Where all evaluations failed nothing is learned.
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
