"""Variation operators on a whole population: selection, crossover, mutation."""

import jax
import jax.numpy as jnp

from nemo_jax.base import Array


def tournament(key: Array, rank: Array, candidates: Array) -> Array:
  """int32[P]: row indices, each the better ranked of two random candidates.

  Args:
    key: random key.
    rank: [P] float32, lower is better.
    candidates: bool[P], the rows to draw from. If there are none, all rows
      are drawn from.
  """
  count = rank.shape[0]
  logits = jnp.where(candidates, 0.0, -jnp.inf)
  logits = jnp.where(jnp.any(candidates), logits, 0.0)
  one, two = jax.random.categorical(key, logits, shape=(2, count))
  return jnp.where(rank[one] <= rank[two], one, two)


def sbx(
  key: Array, one: Array, two: Array, low: float, high: float, eta: float
) -> Array:
  """One child of each pair by simulated binary crossover within bounds.

  Deb and Agrawal 1995, with the bounded spread factor of NSGA-II: a variable
  is crossed with probability one half, and the child lies near either parent
  with equal probability.

  Args:
    key: random key.
    one: [P, N], parents within [low, high].
    two: [P, N], their mates.
    low: lower bound.
    high: upper bound.
    eta: distribution index; large stays near the parents.
  """
  key_cross, key_spread, key_side = jax.random.split(key, 3)
  near, far = jnp.minimum(one, two), jnp.maximum(one, two)
  gap = jnp.maximum(far - near, 1e-6)
  draw = jax.random.uniform(key_spread, one.shape)

  def spread(room):
    alpha = 2 - (1 + 2 * room / gap) ** -(eta + 1)
    inner = (draw * alpha) ** (1 / (eta + 1))
    outer = (1 / jnp.maximum(2 - draw * alpha, 1e-9)) ** (1 / (eta + 1))
    return jnp.where(draw <= 1 / alpha, inner, outer)

  below = (near + far - spread(near - low) * gap) / 2
  above = (near + far + spread(high - far) * gap) / 2
  side = jax.random.bernoulli(key_side, 0.5, one.shape)
  crossed = jax.random.bernoulli(key_cross, 0.5, one.shape)
  crossed &= far - near > 1e-6
  child = jnp.where(crossed, jnp.where(side, below, above), one)
  return jnp.clip(child, low, high)


def polynomial_mutation(
  key: Array,
  genotype: Array,
  low: float,
  high: float,
  eta: float,
  rate: float | None = None,
) -> Array:
  """The genotype [P, N] with some variables moved, within bounds.

  Deb and Goyal 1996, in the bounded form of NSGA-II.

  Args:
    key: random key.
    genotype: [P, N] within [low, high].
    low: lower bound.
    high: upper bound.
    eta: distribution index; large moves little.
    rate: probability for each variable; 1 / N if absent.
  """
  rate = 1 / genotype.shape[-1] if rate is None else rate
  key_where, key_move = jax.random.split(key)
  draw = jax.random.uniform(key_move, genotype.shape)
  span = high - low
  below, above = (genotype - low) / span, (high - genotype) / span
  power = 1 / (eta + 1)
  down = (2 * draw + (1 - 2 * draw) * (1 - below) ** (eta + 1)) ** power - 1
  up = 1 - (2 * (1 - draw) + (2 * draw - 1) * (1 - above) ** (eta + 1)) ** power
  moved = genotype + span * jnp.where(draw < 0.5, down, up)
  chosen = jax.random.bernoulli(key_where, rate, genotype.shape)
  return jnp.clip(jnp.where(chosen, moved, genotype), low, high)


def nearest_allowed(choices: Array, allowed: Array) -> Array:
  """int32[P, N]: each choice, or the nearest one that the node allows.

  Args:
    choices: int32[P, N].
    allowed: bool[N, K]; every node allows something.
  """
  index = jnp.arange(allowed.shape[1])
  distance = jnp.abs(index[:, None] - index[None, :])  # [K wanted, K]
  distance = jnp.where(allowed[:, None, :], distance, allowed.shape[1])
  table = jnp.argmin(distance, axis=-1).astype(jnp.int32)  # [N, K wanted]
  return table[jnp.arange(allowed.shape[0]), choices]
