"""Greedy selection of the proposals that improve a front the most."""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from nemo_jax.core.types import Array
from nemo_jax.search.screening import ROUNDS


def pick(
  best: Float[Array, ' T'],
  worth: Float[Array, 'R T'],
  proposer: Int[Array, ' R'],
  places: Int[Array, ' S'],
  count: int,
  measured: int,
) -> Float[Array, ' R']:
  """Round in which each proposal is picked; +inf if it is not. float32.

  The gain of a proposal is its improvement on the best values so far, as a mean
  over T points. The largest gains are found by lazy evaluation (Minoux 1978):
  gains can only fall, so an old gain is an upper bound, and few gains have to
  be computed again in each round.

  Args:
    best: the least value so far at each point.
    worth: the value of each proposal at each point; +inf where it has none.
    proposer: species of each proposal; -1 if it must not be picked.
    places: how many proposals of each species may be picked.
    count: how many proposals may be picked in all.
    measured: gains that are computed in one step; twice the number of picks in
      a round if that is larger.
  """
  at_once = -(-count // ROUNDS)
  measured = min(max(measured, 2 * at_once), len(worth))

  def choose(carry, index):
    best, bound, turn, free = carry
    closed = jnp.isfinite(turn) | (free[proposer] <= 0) | (proposer < 0)
    bound = jnp.where(closed, -1, bound)

    def measure(state):
      bound, known, _ = state
      _, rows = jax.lax.top_k(bound, measured)
      gain = jnp.mean(jnp.maximum(best - worth[rows], 0), axis=1)
      bound = bound.at[rows].set(jnp.where(closed[rows], -1, gain))
      known = known.at[rows].set(True)
      _, chosen = jax.lax.top_k(bound, at_once)
      return bound, known, chosen

    def unsure(state):
      _, known, chosen = state
      return ~jnp.all(known[chosen])

    start = bound, closed, jnp.zeros(at_once, jnp.int32)
    bound, _, chosen = jax.lax.while_loop(unsure, measure, measure(start))
    new = ~closed[chosen]
    turn = turn.at[chosen].min(jnp.where(new, index, jnp.inf))
    free = free.at[proposer[chosen]].add(-new.astype(free.dtype))
    taken = jnp.where(new[:, None], worth[chosen], jnp.inf)
    best = jnp.minimum(best, jnp.min(taken, axis=0))
    return (best, bound, turn, free), None

  first = jnp.mean(jnp.maximum(best - worth, 0), axis=1)
  start = best, first, jnp.full(len(worth), jnp.inf), places
  steps = jnp.arange(-(-count // at_once), dtype=jnp.float32)
  (_, _, turn, _), _ = jax.lax.scan(choose, start, steps)
  return turn
