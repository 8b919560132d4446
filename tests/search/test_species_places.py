"""How much a species proposes, by the places that it has."""

import functools
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from nemo_jax.search import blocks, species
from nemo_jax.search.problem import Species
from tests.search import alone
from tests.search.feedbacks import NODES, PROBLEM, some_feedback

MANY = 400


class Large(NamedTuple):
  """A species in a large population, and what it asks for at first."""

  species: Species
  first: np.ndarray
  state: Any


@functools.cache
def large(name):
  one = alone.compiled(species.find(name)(PROBLEM, MANY))
  keys = jax.random.split(jax.random.key(0))
  first, state = one.ask(keys[0], one.init(keys[1]))
  return Large(one, np.asarray(first), state)


def told_of_its_own(name, count):
  """The state of a species in a large population with so many places."""
  one = large(name)
  feedback = some_feedback(MANY, np.arange(MANY) < count, asked=len(one.first))
  return one.species.tell(jax.random.key(3), one.state, feedback)


@pytest.mark.parametrize(
  'name',
  [
    name
    if name in ('direct', 'gcn', 'thompson')
    else pytest.param(name, marks=pytest.mark.slow)
    for name in species.names()
  ],
)
def test_of_many_places_a_species_fills_about_its_own(name):
  one = large(name)
  first = one.first
  assert len(first) >= MANY
  # At first it may have all places.
  assert (first[-1] != first[0]).any() or (first[-2] != first[0]).any()
  then, _ = one.species.ask(jax.random.key(2), told_of_its_own(name, 20))
  made = 2 * blocks.BLOCK
  np.testing.assert_array_equal(
    then[made:], np.broadcast_to(then[0], then[made:].shape)
  )
  assert np.asarray(PROBLEM.allowed)[np.arange(NODES), then].all()


@pytest.mark.parametrize(
  'name',
  # It has its proposals made as `direct` has.
  ['direct', pytest.param('lagrangian', marks=pytest.mark.slow), 'thompson'],
)
def test_a_species_has_more_for_a_surrogate_to_choose_from(name):
  # 220 places: two blocks of a hundred rows do not hold twice as many.
  one, state = large(name), told_of_its_own(name, 220)
  made = []
  for ask in (one.species.ask, one.species.ask_more):
    rows = np.asarray(ask(jax.random.key(3), state)[0])
    # What was not made is a copy of the first row.
    copies = (rows[::-1] == rows[0]).all(axis=1)
    made.append(len(rows) - np.argmin(copies))
  assert 220 <= made[0] < made[1]
