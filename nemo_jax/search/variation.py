"""Operators on a whole population: selection, crossover, mutation, survival."""

import jax
import jax.numpy as jnp

from nemo_jax.core.types import Array, ArrayLike, InputError, PyTree


def tournament(
  key: Array, rank: Array, candidates: Array, count: int | None = None
) -> Array:
  """int32[count]: row indices, each the better of two random candidates.

  Args:
    key: random key.
    rank: [P] float32, lower is better.
    candidates: bool[P], the rows to draw from. If there are none, all rows
      are drawn from.
    count: of the winners; P if absent.
  """
  places = rank.shape[0]
  count = places if count is None else count
  candidates |= ~jnp.any(candidates)
  (rows,) = jnp.nonzero(candidates, size=places)
  number = jnp.sum(candidates)
  # Not randint, which draws twice as many random words.
  drawn = jax.random.uniform(key, (2, count)) * number
  drawn = jnp.minimum(drawn.astype(jnp.int32), number - 1)
  one, two = rows[drawn]
  return jnp.where(rank[one] <= rank[two], one, two)


def coins(key: Array, shape: tuple[int, ...]) -> Array:
  """bool[shape]: True with probability one half."""
  # Random words take most of the time of a variation, and each holds 32.
  count = shape[-1]
  words = jax.random.bits(key, (*shape[:-1], -(-count // 32)))
  sides = (words[..., None] >> jnp.arange(32, dtype=words.dtype)) & 1
  return sides.reshape(*shape[:-1], -1)[..., :count].astype(bool)


def sparse_normal(key: Array, rate: float, shape: tuple[int, ...]) -> Array:
  """float32[shape]: standard normal with probability `rate`, else 0."""
  draw = jax.random.uniform(key, shape) / rate
  # A number below the rate is as evenly spread as before.
  noise = jax.scipy.special.ndtri(jnp.clip(draw, 1e-6, 1 - 1e-6))
  return jnp.where(draw < 1, noise, 0)


def _root(values: Array, degree: float) -> Array:
  """The root of what is not negative, in half the time of a power."""
  return jnp.exp(jnp.log(values) / degree)


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
  near, far = jnp.minimum(one, two), jnp.maximum(one, two)
  gap = jnp.maximum(far - near, 1e-6)
  # One random number serves for three: the quarter that it lies in stands for
  # two coins, where in it for the spread.
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
  # A number below the rate is as evenly spread as before.
  draw = jax.random.uniform(key, genotype.shape) / rate
  chosen, draw = draw < 1, jnp.minimum(draw, 1)
  span = high - low
  down = draw < 0.5
  room = jnp.where(down, genotype - low, high - genotype) / span
  tail = 2 * jnp.minimum(draw, 1 - draw)
  step = 1 - _root(tail + (1 - tail) * (1 - room) ** (eta + 1), eta + 1)
  moved = genotype + span * jnp.where(down, -step, step)
  return jnp.clip(jnp.where(chosen, moved, genotype), low, high)


def nearest_allowed(choices: ArrayLike, allowed: ArrayLike) -> Array:
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


def survivors(parents: PyTree, offspring: PyTree, source: Array) -> PyTree:
  """The genotypes that live on, in the rows of the population.

  Args:
    parents: [P, ...] each.
    offspring: [Q, ...] each, as asked.
    source: int32[P], see `Feedback.source`.

  Raises:
    InputError: the parents are those of another population.
  """
  made_for, places = len(jax.tree.leaves(parents)[0]), len(source)
  if made_for != places:
    raise InputError(
      f'a species was made for a population of {made_for}; this one has '
      f'{places}'
    )
  alive = source < places

  # Not one array of both, which takes as long to write as to read twice.
  def pick(old, new):
    old, new = old[jnp.where(alive, source, 0)], new[source - places]
    return jnp.where(jnp.expand_dims(alive, range(1, old.ndim)), old, new)

  return jax.tree.map(pick, parents, offspring)
