"""The estimate, corrected by all that was measured, at prices at random."""

import jax
import jax.numpy as jnp

from nemo_jax import estimate, pareto, surrogate
from nemo_jax.base import Problem, Species

# Of what a problem may lack; see `estimate.of`.
NEEDS_ESTIMATE = True


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
    InputError: the problem has no estimate.
  """
  market = estimate.market(problem)
  count = max(population_size, proposals)
  nodes, objectives = len(problem.allowed), len(problem.ideal)

  def init(key):
    del key
    return pareto.empty_population(surrogate.MEMORY, nodes, objectives)

  def ask(key, seen):
    key_draw, key_price = jax.random.split(key)
    factors = surrogate.draw_factors(key_draw, problem, seen, draws)
    # Nothing is learned before the first evaluation.
    known = jnp.any(jnp.isfinite(seen.objectives))
    factors = jnp.where(known, factors, 1)
    row = jnp.arange(count) % draws
    prices = market.draw(key_price, count)
    return jax.vmap(market.solve)(prices, factors[row]), seen

  def tell(key, seen, feedback):
    del key, seen
    return feedback.seen

  return Species(init, ask, tell)
