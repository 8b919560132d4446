"""Which of the proposals are evaluated."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemo_jax.core.types import InputError
from nemo_jax.search import nemo, screening
from nemo_jax.search import surrogate as surrogate_lib
from nemo_jax.search.problem import Species, Surrogate
from tests.placement import placement_problem
from tests.search import diaries
from tests.search.compiling import quickly
from tests.search.diaries import SIZE

PROBLEM = placement_problem()
NODES = PROBLEM.allowed.shape[0]
KEY = jax.random.key(3)
learning = functools.partial(surrogate_lib.make, screens=False)


def picky(looked=None):
  """A surrogate that learns nothing, and picks the last new proposals first.

  Args:
    looked: to which the species of all proposals that it sees are added.
  """

  def select(key, state, archive, proposals, proposer, places, count):
    del key, state, archive, proposals, places
    if looked is not None:
      jax.debug.callback(looked.append, proposer)
    new = proposer >= 0
    behind = jnp.cumsum(new[::-1])[::-1] - 1
    return jnp.where(new & (behind < count), behind, jnp.inf)

  def build(problem):
    del problem
    update = lambda key, state, evaluated: (state, None)
    return Surrogate(lambda: (), update, select)

  return build


def stubborn(problem, size):
  """A species that proposes the same in every row."""
  row = jnp.argmax(problem.allowed, axis=1)
  rows = jnp.broadcast_to(row.astype(jnp.int32), (size, len(row)))
  return Species(
    init=lambda key: (),
    ask=lambda key, state: (rows, state),
    tell=lambda key, state, feedback: state,
  )


@functools.cache
def compiled(search):
  return quickly(search.ask)


def first_asked(team, **options):
  """What is asked in the first generation."""
  search = nemo.make(PROBLEM, team, SIZE, archive_size=32, **options)
  asked, _ = compiled(search)(KEY, search.init(jax.random.key(0)))
  return jax.tree.map(np.asarray, asked)


def check_asked(asked):
  """What is asked are rows of what is proposed, each with its species."""
  np.testing.assert_array_equal(asked.choices, asked.proposed[asked.row])
  assert (np.diff(asked.row) > 0).all()
  owners = np.repeat(np.arange(len(asked.counts)), asked.counts)
  np.testing.assert_array_equal(asked.proposer, owners[asked.row])
  assert sorted(asked.queue) == list(range(len(asked.proposed)))
  np.testing.assert_array_equal(owners[asked.queue], owners)
  # What is asked of a species stands first in its queue.
  for i, start in enumerate(screening.starts(asked.counts)):
    own = asked.row[asked.proposer == i]
    assert set(asked.queue[start : start + len(own)]) == set(own)


# Without a surrogate that picks.


def test_the_first_of_each_species_are_asked():
  asked = first_asked(diaries.diarists(3), surrogate=None)
  check_asked(asked)
  sizes = np.bincount(asked.proposer)
  assert sorted(sizes) == [5, 5, 6]
  first = screening.starts(asked.counts)[asked.proposer]
  place = np.concatenate([np.arange(size) for size in sizes])
  np.testing.assert_array_equal(asked.row, first + place)


def test_a_species_keeps_its_places_though_it_has_nothing_new():
  asked = first_asked([stubborn, diaries.diarist], surrogate=None)
  check_asked(asked)
  np.testing.assert_array_equal(np.bincount(asked.proposer), [8, 8])


# With one.


def test_what_a_surrogate_picks_is_asked():
  asked = first_asked(diaries.diarists(2), surrogate=picky())
  check_asked(asked)
  # At first a species may have all places.
  np.testing.assert_array_equal(asked.row, np.arange(SIZE, 2 * SIZE))


def test_places_of_a_species_without_anything_new_go_to_others():
  asked = first_asked([diaries.diarist, stubborn], surrogate=picky())
  check_asked(asked)
  np.testing.assert_array_equal(np.bincount(asked.proposer), [15, 1])
  assert len(np.unique(asked.choices, axis=0)) == SIZE


def test_where_nothing_is_new_old_rows_fill_the_places():
  asked = first_asked([stubborn], surrogate=picky())
  check_asked(asked)
  assert len(np.unique(asked.choices, axis=0)) == 1


def test_of_very_many_proposals_the_first_of_each_are_looked_at(monkeypatch):
  monkeypatch.setattr(screening, 'PROPOSALS', 1)
  looked = []
  check_asked(first_asked(diaries.diarists(3), surrogate=picky(looked)))
  jax.effects_barrier()
  # Three species propose 16 each; of these 1.5 times the places are looked at.
  counts = np.bincount(np.asarray(looked[0]) + 1, minlength=4)
  np.testing.assert_array_equal(counts, [0, 8, 8, 8])


# What is called.


def listened(called):
  """A diarist, of whose calls, `ask` or `ask_more`, are taken note."""

  def build(problem, size):
    one = diaries.diarist(problem, size)

    def noted(word):
      def ask(key, state):
        called.append(word)
        return one.ask(key, state)

      return ask

    return one._replace(ask=noted('ask'), ask_more=noted('ask_more'))

  return build


@pytest.mark.parametrize(
  ('lacks', 'surrogate', 'word'),
  [
    ('data', surrogate_lib.make, 'ask_more'),
    ('data', picky(), 'ask_more'),
    ('data', learning, 'ask'),
    ('data', None, 'ask'),
    ('prior', surrogate_lib.make, 'ask'),
    ('known_objectives', surrogate_lib.make, 'ask'),
  ],
)
def test_species_propose_as_the_search_screens(lacks, surrogate, word):
  called, problem = [], PROBLEM.replace(**{lacks: None})
  search = nemo.make(problem, [listened(called)], SIZE, surrogate=surrogate)
  jax.eval_shape(search.ask, KEY, jax.eval_shape(search.init, KEY))
  assert called == [word]


@pytest.mark.parametrize('surrogate', [surrogate_lib.make, None])
def test_a_species_that_proposes_too_little_is_refused(surrogate):
  few = lambda problem, size: diaries.diarist(problem, size - 1)
  team = [diaries.diarist, few]
  search = nemo.make(PROBLEM, team, SIZE, surrogate=surrogate)
  words = 'a species proposes 15 rows; a population of 16 needs as many'
  with pytest.raises(InputError, match=words):
    jax.eval_shape(search.ask, KEY, jax.eval_shape(search.init, KEY))
