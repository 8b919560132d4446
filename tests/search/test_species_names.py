"""Species are found by name, alone and in teams, and as files of one's own."""

import inspect

import jax
import numpy as np
import pytest

from nemo_jax.core.types import InputError
from nemo_jax.search import nemo, species
from nemo_jax.search.problem import SpeciesBuilder
from tests.search.feedbacks import NODES, PROBLEM

PLACES = 8
KEY = jax.random.key(0)


# Names.


@pytest.mark.parametrize('name', species.names())
def test_every_name_has_a_builder(name):
  builder = species.find(name)
  assert isinstance(builder, SpeciesBuilder)
  first, second, *rest = inspect.signature(builder.make).parameters.values()
  assert (first.name, second.name) == ('problem', 'population_size')
  assert all(parameter.default is not parameter.empty for parameter in rest)


def test_options_are_those_of_a_copy():
  made = []
  make = lambda problem, size, **options: made.append((size, options))
  builder = SpeciesBuilder(make, needs_prior=True)
  first = builder.with_options(a=1, b=2)
  second = first.with_options(b=3)
  for one in (builder, first, second):
    one(None, PLACES)
    assert one.needs_prior
  expected = [{}, {'a': 1, 'b': 2}, {'a': 1, 'b': 3}]
  assert made == [(PLACES, options) for options in expected]


def test_an_unknown_species_lists_the_known():
  with pytest.raises(InputError, match='nonsense') as caught:
    species.find('nonsense')
  message = str(caught.value)
  assert '\n' not in message
  assert all(name in message for name in species.names())


@pytest.mark.parametrize(
  ('name', 'words'),
  [
    ('direct:SNES', ['direct', 'no choice of algorithm']),
    ('gcn:Nonsense', ['Nonsense', 'SNES', 'SSNE']),
    ('', ['direct', 'gcn']),
    (':SNES', ['direct', 'gcn']),
  ],
)
def test_what_cannot_be_found_is_said_in_one_line(name, words):
  with pytest.raises(InputError) as caught:
    species.find(name)
  message = str(caught.value)
  assert '\n' not in message
  assert all(word in message for word in words)


def test_an_algorithm_stands_behind_the_colon():
  one = species.find('gcn:SNES')(PROBLEM, PLACES)
  state = jax.eval_shape(one.init, jax.random.key(0))
  # SNES keeps a distribution, SSNE a population.
  assert hasattr(state.algorithm, 'std')
  assert not hasattr(state.algorithm, 'population')
  choices, _ = jax.eval_shape(one.ask, jax.random.key(0), state)
  assert choices.shape[1:] == (NODES,)


# Teams.


def test_a_team_is_in_the_order_of_its_words():
  assert tuple(species.team(['nemo'])) == species.NEMO
  assert tuple(species.team(['paper'])) == species.PAPER
  words = ['boltzmann', 'nemo', 'gcn:SNES', 'gcn']
  expected = ['boltzmann', *species.NEMO, 'gcn:SNES', 'gcn']
  assert list(species.team(words)) == expected


@pytest.mark.parametrize(
  'words', [['direct', 'direct'], ['nemo', 'thompson'], ['paper', 'floor']]
)
def test_a_species_that_is_there_twice_is_refused(words):
  with pytest.raises(InputError, match='give each once'):
    species.team(words)


def test_the_papers_species_have_no_parents_from_others():
  for name, builder in species.team(['paper']).items():
    takes = 'migrant_rate' in inspect.signature(builder.make).parameters
    assert builder.options == ({'migrant_rate': 0.0} if takes else {}), name
  assert species.team(['direct'])['direct'].options == {}


def test_those_that_need_a_prior_are_named():
  needing = species.need_prior(['boltzmann', 'nemo'])
  assert needing == ['lagrangian', 'thompson', 'priced_gcn']
  assert species.need_prior(['paper']) == []


@pytest.mark.parametrize(
  ('words', 'blind'),
  [
    (['paper'], True),
    (['paper', 'boltzmann'], True),
    (['direct'], False),
    (['nemo'], False),
  ],
)
def test_a_team_with_the_papers_is_blind(words, blind):
  species.team(words)
  assert species.is_blind(words) == blind


@pytest.mark.parametrize('other', ['thompson', 'lagrangian', 'priced_gcn:SNES'])
@pytest.mark.parametrize('first', [True, False])
def test_the_papers_team_is_refused_beside_what_needs_sensitivities(
  other, first
):
  words = ['paper', other] if first else [other, 'paper']
  with pytest.raises(InputError, match=f'without sensit.*{other}') as caught:
    species.team(words)
  assert '\n' not in str(caught.value)


# Files of one's own.

OWN = """
import jax.numpy as jnp

from nemo_jax.search.problem import Species, SpeciesBuilder


def make(problem, population_size, choice=1, algorithm=None):
  shape = population_size, problem.allowed.shape[0]
  rows = jnp.full(shape, choice, jnp.int32)
  return Species(
    init=lambda key: (),
    ask=lambda key, state: (rows, state),
    tell=lambda key, state, feedback: state,
  )


BUILDER = SpeciesBuilder(make, needs_prior=True)
"""


@pytest.fixture
def own(tmp_path):
  """The path of a file with a species."""
  path = tmp_path / 'mine.py'
  path.write_text(OWN)
  return str(path)


def test_a_path_names_a_species_of_ones_own(own):
  builder = species.find(own)
  assert isinstance(builder, SpeciesBuilder)
  for choice, one in ((1, builder), (2, builder.with_options(choice=2))):
    rows, _ = one(PROBLEM, PLACES).ask(KEY, ())
    np.testing.assert_array_equal(rows, np.full((PLACES, NODES), choice))


def test_a_species_of_ones_own_searches_in_a_team(own):
  team = species.team([own, 'direct'])
  assert list(team) == [own, 'direct']
  assert species.need_prior([own, 'direct']) == [own]
  search = nemo.make(PROBLEM, team.values(), PLACES, surrogate=None)
  state = jax.eval_shape(search.init, KEY)
  after, metrics = jax.eval_shape(search.step, KEY, state)
  assert jax.tree.structure(after) == jax.tree.structure(state)
  assert metrics['allocation'].shape == (2,)


def test_an_algorithm_may_stand_behind_a_path(own):
  builder = species.find(f'{own}:SNES')
  assert builder.options == {'algorithm': 'SNES'}
  with pytest.raises(InputError, match='unknown algorithm'):
    species.find(f'{own}:Nonsense')


@pytest.mark.parametrize(
  ('text', 'words'),
  [
    ('import no_such_thing', 'cannot be imported: ModuleNotFoundError'),
    ('def make(problem', 'cannot be imported: SyntaxError'),
    (None, 'cannot be imported: FileNotFoundError'),
    (OWN.replace('BUILDER', 'builder'), 'has no BUILDER'),
    (OWN + 'BUILDER = make', 'is a function; give a SpeciesBuilder'),
  ],
)
def test_a_file_that_is_no_species_is_refused_in_one_line(
  tmp_path, text, words
):
  path = tmp_path / 'mine.py'
  if text is not None:
    path.write_text(text)
  with pytest.raises(InputError) as caught:
    species.team(['direct', str(path)])
  message = str(caught.value)
  assert '\n' not in message
  assert f'species {str(path)!r} {words}' in message
