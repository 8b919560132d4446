"""A search with one species alone; what is not the species is compiled once."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nemo_jax import pareto
from nemo_jax.core.types import Array
from nemo_jax.search import nemo, surrogate
from nemo_jax.search.problem import (
  Feedback,
  Population,
  Problem,
  Species,
  Surrogate,
)
from tests.search import diaries
from tests.search.compiling import quickly
from tests.search.feedbacks import PROBLEM, some_feedback

PLACES = 16
learn = jax.jit(surrogate.learn)


class Mirror(NamedTuple):
  """What another species proposes, and what it will be told of it."""

  proposals: Array  # [Q, N] int32
  feedback: Feedback


class Searched(NamedTuple):
  """A search; all begins with the generations."""

  population: Population
  private: Any  # the state of the species
  asked: np.ndarray  # [generations, Q, N]
  hypervolume: np.ndarray
  failures: np.ndarray


def compiled(one: Species) -> Species:
  """The same species, of which each function is a program."""

  def tell(key, state, feedback):
    told = one.tell(key, state, feedback)
    # As a search does, so that nothing is traced twice.
    return jax.tree.map(lambda x, old: jnp.asarray(x, old.dtype), told, state)

  functions = one._replace(tell=tell)
  return Species(*(function and quickly(function) for function in functions))


def _noting(problem: Problem) -> Surrogate:
  """It tells species what was evaluated, and leaves it to them to learn."""
  none = pareto.empty_population(
    surrogate.MEMORY, problem.allowed.shape[0], problem.ideal.shape[0]
  )

  def update(key, seen, evaluated):
    seen = surrogate.remember(key, seen, evaluated)
    return seen, seen

  return Surrogate(lambda: none, update)


@functools.cache
def _generation(count: int):
  """The first state and the step of a search that mirrors `count` proposals."""
  blank = np.zeros((count, PROBLEM.allowed.shape[0]), np.int32)
  feedback = some_feedback(PLACES, asked=count)
  feedback = feedback._replace(learned=_noting(PROBLEM).init())
  mirror = Species(
    init=lambda key: Mirror(blank, feedback),
    ask=lambda key, state: (state.proposals, state),
    tell=lambda key, state, feedback: state._replace(feedback=feedback),
  )
  search = nemo.make(
    PROBLEM,
    diaries.fixed(mirror),
    PLACES,
    surrogate=_noting,
    archive_size=64,
  )

  @quickly
  def step(key, state, proposals):
    [own] = state.species
    own = own._replace(proposals=proposals)
    return search.step(key, state._replace(species=(own,)))

  return search.init(jax.random.key(0)), step


def search(
  one: Species,
  start: Array,
  key: Array,
  generations: int,
  learns: bool = False,
) -> Searched:
  """A search by a species, which is best `compiled`.

  Args:
    one: the species.
    start: key of its first state.
    key: of the search.
    generations: how many.
    learns: whether it reads what a surrogate has learned.
  """
  private, history = one.init(start), []
  for generation in range(generations):
    ask_key, tell_key = jax.random.split(jax.random.fold_in(key, generation))
    asked, private = one.ask(ask_key, private)
    if not generation:
      state, step = _generation(len(asked))
    state, metrics = step(key, state, asked)
    feedback = state.species[0].feedback
    learned = learn(PROBLEM, feedback.learned) if learns else None
    feedback = feedback._replace(learned=learned)
    private = one.tell(tell_key, private, feedback)
    history.append(
      Searched(
        state.population,
        private,
        asked,
        metrics['hypervolume'],
        metrics['failures'],
      )
    )
  return jax.tree.map(lambda *x: np.stack(x), *history)
