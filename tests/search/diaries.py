"""Species that note what becomes of their proposals, and what they search."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nemo_jax.search.problem import Problem, Species, SpeciesBuilder

SIZE = 16
# What becomes of evaluations; see `moody`.
WELL, SICK, DEAD = range(3)


class Diary(NamedTuple):
  """A species' genotypes: a number for each proposal it ever made."""

  parents: jax.Array  # [P] int32
  asked: jax.Array  # [P] int32
  made: jax.Array  # int32[]
  rank: jax.Array
  own: jax.Array


def choices_of(problem: Problem, seed: int, number: jax.Array) -> jax.Array:
  """int32[N]: what a diarist proposes under a number."""
  logits = jnp.where(problem.allowed, 0.0, -jnp.inf)
  key = jax.random.fold_in(jax.random.key(seed), number)
  return jax.random.categorical(key, logits).astype(jnp.int32)


def diarist(problem: Problem, size: int, seed: int = 0) -> Species:
  """Choices drawn from the number of a proposal, so that both must agree."""

  def init(key):
    del key
    none = jnp.full(size, -1, jnp.int32)
    return Diary(
      none,
      none,
      jnp.zeros((), jnp.int32),
      jnp.full(size, jnp.inf),
      jnp.zeros(size, bool),
    )

  def ask(key, state):
    del key
    asked = state.made + jnp.arange(size)
    state = state._replace(asked=asked, made=state.made + size)
    propose = functools.partial(choices_of, problem, seed)
    return jax.vmap(propose)(asked), state

  def tell(key, state, feedback):
    del key
    both = jnp.concatenate([state.parents, state.asked])
    return state._replace(
      parents=both[feedback.source], rank=feedback.rank, own=feedback.own
    )

  return Species(init, ask, tell)


def diarists(count: int) -> list[SpeciesBuilder]:
  """Builders of so many diarists, all of other choices."""
  return [
    SpeciesBuilder(diarist).with_options(seed=seed) for seed in range(count)
  ]


def fixed(*species: Species):
  """Builders of species that are made already."""
  return [lambda problem, size, one=one: one for one in species]


def moody(problem: Problem, mood: int = WELL) -> Problem:
  """The same, but that its data also say which of the evaluations fail.

  None fail, or all, or those in which the first two choices are the same.
  """

  def evaluate(data, choices):
    data, mood = data
    good = problem.evaluate(data, choices)
    same = choices[0] == choices[1]
    bad = (mood == DEAD) | ((mood == SICK) & same)
    return jnp.where(bad, jnp.nan, good)

  return problem.replace(data=in_mood(problem, mood), evaluate=evaluate)


def in_mood(problem: Problem, mood: int):
  """The data of a problem as it was before it was moody, and a mood."""
  return problem.data, jnp.int32(mood)


def objectives_of(problem: Problem, choices: jax.Array) -> np.ndarray:
  """float32[P, M], of choices [P, N]."""
  price = jax.jit(jax.vmap(problem.evaluate, in_axes=(None, 0)))
  return np.asarray(price(problem.data, choices))


def living(rows) -> np.ndarray:
  """bool[n]: which rows of a population or an archive are evaluated."""
  return np.isfinite(rows.objectives).all(axis=1)


def assert_same(state, other) -> None:
  """That two searches went the same way, but for rounding."""
  for one, two in (
    (state.archive, other.archive),
    (state.population, other.population),
  ):
    np.testing.assert_array_equal(one.choices, two.choices)
    np.testing.assert_allclose(one.objectives, two.objectives, rtol=1e-6)
