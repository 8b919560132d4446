"""Operators on a whole population: selection, crossover, mutation, survival.

Rates, bounds and distribution indices are numbers, and may be traced.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Integer

from nemo_jax.core.types import Array, ArrayLike, InputError, PyTree


def tournament(
  key: Array,
  rank: Float[Array, ' P'],
  candidates: Bool[Array, ' P'],
  count: int | None = None,
) -> Int[Array, ' count']:
  """Rows of the winners of tournaments between two random candidates; int32.

  Args:
    key: random key.
    rank: lower is better.
    candidates: the rows to draw from. If there are none, all rows are drawn
      from.
    count: number of winners; P if absent.
  """
  places = rank.shape[0]
  count = places if count is None else count
  candidates |= ~jnp.any(candidates)
  (rows,) = jnp.nonzero(candidates, size=places)
  number = jnp.sum(candidates)
  # Not `randint`, which draws twice as many random words.
  drawn = jax.random.uniform(key, (2, count)) * number
  drawn = jnp.minimum(drawn.astype(jnp.int32), number - 1)
  one, two = rows[drawn]
  return jnp.where(rank[one] <= rank[two], one, two)


def coins(key: Array, shape: tuple[int, ...]) -> Bool[Array, '...']:
  """Random booleans of a shape, True with probability one half."""
  # One random word serves for 32 booleans: drawing words takes most of the time
  # of a variation.
  count = shape[-1]
  words = jax.random.bits(key, (*shape[:-1], -(-count // 32)))
  sides = (words[..., None] >> jnp.arange(32, dtype=words.dtype)) & 1
  return sides.reshape(*shape[:-1], -1)[..., :count].astype(bool)


def sparse_normal(
  key: Array, rate: Any, shape: tuple[int, ...]
) -> Float[Array, '...']:
  """Random float32: standard normal with probability `rate`, else 0."""
  draw = jax.random.uniform(key, shape) / rate
  # Divided by the rate, the numbers below it are uniform in [0, 1) again.
  noise = jax.scipy.special.ndtri(jnp.clip(draw, 1e-6, 1 - 1e-6))
  return jnp.where(draw < 1, noise, 0)


def _root(values: Float[Array, ' *s'], degree: Any) -> Float[Array, ' *s']:
  """Root of non-negative values, in half the time of a power."""
  return jnp.exp(jnp.log(values) / degree)


def sbx(
  key: Array,
  one: Float[Array, 'P N'],
  two: Float[Array, 'P N'],
  low: Any,
  high: Any,
  eta: Any,
) -> Float[Array, 'P N']:
  """One child of each pair by simulated binary crossover within bounds.

  Deb and Agrawal 1995, with the bounded spread factor of NSGA-II: a variable
  is crossed with probability one half, and the child lies near either parent
  with equal probability.

  Args:
    key: random key.
    one: parents, within [low, high].
    two: their mates.
    low: lower bound.
    high: upper bound.
    eta: distribution index; with a large one, children stay near their parents.
  """
  near, far = jnp.minimum(one, two), jnp.maximum(one, two)
  gap = jnp.maximum(far - near, 1e-6)
  # One random number serves for three: its quarter of [0, 1) gives two coins,
  # and its position in the quarter the spread.
  draw = 4 * jax.random.uniform(key, one.shape)
  quarter = jnp.floor(draw)
  below, crossed = quarter % 2 == 0, quarter < 2

  room = jnp.where(below, near - low, high - far)
  alpha = 2 - (1 + 2 * room / gap) ** -(eta + 1)
  draw = alpha * (draw - quarter)
  outer = 1 / jnp.maximum(2 - draw, 1e-9)
  spread = _root(jnp.where(draw <= 1, draw, outer), eta + 1)
  child = (near + far + jnp.where(below, -spread, spread) * gap) / 2
  child = jnp.where(crossed & (far - near > 1e-6), child, one)
  return jnp.clip(child, low, high)


def polynomial_mutation(
  key: Array,
  genotype: Float[Array, 'P N'],
  low: Any,
  high: Any,
  eta: Any,
  rate: Any = None,
) -> Float[Array, 'P N']:
  """The genotypes with some variables mutated, within bounds.

  Deb and Goyal 1996, in the bounded form of NSGA-II.

  Args:
    key: random key.
    genotype: within [low, high].
    low: lower bound.
    high: upper bound.
    eta: distribution index; with a large one, variables change little.
    rate: probability for each variable; 1 / N if absent.
  """
  rate = 1 / genotype.shape[-1] if rate is None else rate
  # Divided by the rate, the numbers below it are uniform in [0, 1) again.
  draw = jax.random.uniform(key, genotype.shape) / rate
  chosen, draw = draw < 1, jnp.minimum(draw, 1)
  span = high - low
  down = draw < 0.5
  room = jnp.where(down, genotype - low, high - genotype) / span
  tail = 2 * jnp.minimum(draw, 1 - draw)
  step = 1 - _root(tail + (1 - tail) * (1 - room) ** (eta + 1), eta + 1)
  moved = genotype + span * jnp.where(down, -step, step)
  return jnp.clip(jnp.where(chosen, moved, genotype), low, high)


def nearest_allowed(
  choices: Integer[ArrayLike, 'P N'], allowed: Bool[ArrayLike, 'N K']
) -> Int[Array, 'P N']:
  """Nearest choice that each node allows, or the choice itself; int32.

  Args:
    choices: from 0 to K - 1.
    allowed: at least one choice for each node.
  """
  index = jnp.arange(allowed.shape[1])
  distance = jnp.abs(index[:, None] - index[None, :])  # [K wanted, K]
  distance = jnp.where(allowed[:, None, :], distance, allowed.shape[1])
  table = jnp.argmin(distance, axis=-1).astype(jnp.int32)  # [N, K wanted]
  return table[jnp.arange(allowed.shape[0]), choices]


def survivors(
  parents: PyTree, offspring: PyTree, source: Int[Array, ' P']
) -> PyTree:
  """Genotypes of the survivors, one for each row of the population.

  Args:
    parents: arrays [P, ...].
    offspring: arrays [Q, ...], the genotypes of the last proposals.
    source: see `Feedback.source`.

  Raises:
    InputError: the parents were made for another population size.
  """
  made_for, places = len(jax.tree.leaves(parents)[0]), len(source)
  if made_for != places:
    raise InputError(
      f'a species was made for a population of {made_for}; this one has '
      f'{places}'
    )
  alive = source < places

  # Both are read, because writing them into one array would take as long.
  def pick(old, new):
    old, new = old[jnp.where(alive, source, 0)], new[source - places]
    return jnp.where(jnp.expand_dims(alive, range(1, old.ndim)), old, new)

  return jax.tree.map(pick, parents, offspring)
