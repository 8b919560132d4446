"""What a search can rely on, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemo_jax.core.types import InputError
from nemo_jax.search import contract, nemo
from nemo_jax.search import species as species_lib
from nemo_jax.search.problem import Species
from tests import placement
from tests.search import diaries
from tests.search.compiling import quickly

PLACES = 8
PROBLEM = placement.placement_problem(5)
NODES, CHOICES = PROBLEM.allowed.shape
KEY = jax.random.key(0)
# As PROBLEM, but that a node has one choice.
OTHER = PROBLEM.replace(
  allowed=PROBLEM.allowed.at[1].set(jnp.array([False, True, False]))
)


def stubborn(choices) -> Species:
  """It proposes the same choices in every row; they are its state."""
  return Species(
    init=lambda key: jnp.asarray(choices),
    ask=lambda key, row: (jnp.broadcast_to(row, (PLACES, *row.shape)), row),
    tell=lambda key, row, feedback: row,
  )


STUBBORN = diaries.fixed(stubborn([1] * NODES))


# Problems.


def graph(**changes):
  return {'graph': PROBLEM.graph._replace(**changes)}


def prior(**changes):
  return {'prior': PROBLEM.prior._replace(**changes)}


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    ({'allowed': PROBLEM.allowed.at[3].set(False)}, 'leaves node 3 no choice'),
    ({'allowed': PROBLEM.allowed.astype(int)}, 'give truth values'),
    ({'allowed': jnp.ones((NODES, 1), bool)}, 'two choices or more'),
    ({'allowed': jnp.ones((0, CHOICES), bool)}, 'one node or more'),
    ({'allowed': jnp.ones(NODES, bool)}, r'give \[N, K\]'),
    ({'allowed': jnp.ones((NODES + 1, CHOICES), bool)}, r'give \[6, F\]'),
    ({'ideal': PROBLEM.reference}, 'objective 0 has ideal'),
    ({'ideal': PROBLEM.reference.at[:2].set(0)}, 'objective 2 has ideal'),
    ({'ideal': PROBLEM.ideal.at[1].set(jnp.nan)}, 'objective 1 has ideal nan'),
    (
      {'ideal': PROBLEM.ideal.at[1].set(-jnp.inf)},
      'objective 1 has ideal -inf',
    ),
    ({'reference': PROBLEM.reference.at[0].set(jnp.inf)}, 'reference inf'),
    ({'reference': PROBLEM.reference[:2]}, r'reference: the shape is \(2,\)'),
    ({'ideal': 0.0}, r'ideal: the shape is \(\); give \[M\]'),
    ({'ideal': ['a', 'b', 'c']}, 'no array of numbers'),
    ({'ideal': np.zeros(0), 'reference': np.zeros(0)}, 'ideal is empty'),
    (graph(nodes=PROBLEM.graph.nodes[:3]), r'graph.nodes: the shape is \(3, 3'),
    (graph(nodes=PROBLEM.graph.nodes * np.nan), 'nodes holds values that'),
    (graph(senders=PROBLEM.graph.senders + 2), 'senders names a node'),
    (graph(receivers=PROBLEM.graph.receivers[:2]), 'receivers: the shape'),
    (prior(loss=PROBLEM.prior.loss[:2]), 'prior.loss: the shape'),
    (prior(costs=PROBLEM.prior.costs + np.inf), 'costs holds values'),
    (prior(pairs=PROBLEM.prior.pairs - 1), 'pairs names a node'),
    (
      prior(pair_costs=PROBLEM.prior.pair_costs[..., :1]),
      r'pair_costs: the shape is \(4, 3, 3, 1\); give \[4, 3, 3, 3\]',
    ),
  ],
)
def test_a_problem_that_does_not_fit_together_is_refused(changes, words):
  with pytest.raises(InputError, match=words) as caught:
    nemo.make(PROBLEM.replace(**changes), STUBBORN, PLACES)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
  'changes', [{'graph': None}, {'prior': None}, {'data': None}]
)
def test_what_a_search_can_do_without_may_be_absent(changes):
  contract.check_problem(PROBLEM.replace(**changes))


# Options.


@pytest.mark.parametrize('name', ['archive_size', 'population_size'])
@pytest.mark.parametrize('size', [0, -1, 2.5, None])
def test_what_is_no_number_of_rows_is_refused(name, size):
  sizes = {'population_size': PLACES, 'archive_size': 64} | {name: size}
  with pytest.raises(InputError, match=f'{name} is .*; give a whole number'):
    nemo.make(PROBLEM, STUBBORN, **sizes)


@pytest.mark.parametrize(
  ('options', 'words'),
  [
    ({'exploration': -1.0}, 'exploration is -1.0'),
    ({'exploration': np.nan}, 'exploration is nan'),
    ({'utility': 'luck'}, "'luck'; the choices are r2, hy"),
  ],
)
def test_options_out_of_range_are_refused(options, words):
  with pytest.raises(InputError, match=words):
    nemo.make(PROBLEM, STUBBORN, PLACES, **options)


@pytest.mark.parametrize(
  ('count', 'words'),
  [
    (0, 'there are no species'),
    (5, f'population of {PLACES} is too small for 5 species'),
  ],
)
def test_a_team_that_does_not_fit_the_population_is_refused(count, words):
  with pytest.raises(InputError, match=words):
    nemo.make(PROBLEM, count * STUBBORN, PLACES)


# Species.


def test_every_builder_is_called_once_with_the_problem_and_the_population():
  called = []

  def build(problem, population_size):
    called.append((problem, population_size))
    return stubborn([1] * NODES)

  search = nemo.make(PROBLEM, iter([build, build]), PLACES, surrogate=None)
  state = jax.eval_shape(search.init, KEY)
  jax.eval_shape(search.step, KEY, state)
  assert len(called) == 2
  for problem, size in called:
    assert problem is PROBLEM
    assert size == PLACES


@pytest.mark.parametrize('name', species_lib.names())
def test_one_builder_serves_searches_of_several_problems(name):
  builder, small = species_lib.find(name), placement.placement_problem(4)
  searches = {
    problem.allowed.shape[0]: nemo.make(problem, [builder], size)
    for problem, size in ((PROBLEM, PLACES), (small, PLACES + 4))
  }
  for nodes, search in searches.items():
    state = jax.eval_shape(search.init, KEY)
    asked, _ = jax.eval_shape(search.ask, KEY, state)
    assert asked.choices.shape == (PLACES if nodes == NODES else 12, nodes)


def test_a_species_that_needs_a_prior_is_refused_without_one():
  builder = species_lib.find('lagrangian')
  assert builder.needs_prior
  with pytest.raises(InputError, match='give make_problem sensitivities'):
    nemo.make(PROBLEM.replace(prior=None), [builder], PLACES)


def test_a_species_that_learns_from_a_surrogate_is_refused_without_one():
  team = [species_lib.find('thompson')]
  search = nemo.make(PROBLEM, team, PLACES, surrogate=None)
  state = jax.eval_shape(search.init, KEY)
  with pytest.raises(InputError, match='thompson needs a surrogate'):
    jax.eval_shape(search.step, KEY, state)


@pytest.mark.parametrize('name', ['direct', 'gcn'])
def test_species_made_for_another_population_are_refused(name):
  small = lambda problem, size: species_lib.find(name)(problem, PLACES)
  search = nemo.make(PROBLEM, [small], 2 * PLACES, surrogate=None)
  state = jax.eval_shape(search.init, KEY)
  words = 'for a population of 8; this one has 16'
  with pytest.raises(InputError, match=words):
    jax.eval_shape(search.step, KEY, state)


def check_allowed(problem, asked):
  for rows in (asked.choices, asked.proposed):
    assert np.asarray(problem.allowed)[np.arange(NODES), rows].all()


@functools.cache
def compiled(screened):
  """The first state of a search, and its `ask`."""
  problem = PROBLEM if screened else PROBLEM.replace(known_objectives=None)
  search = nemo.make(problem, STUBBORN, PLACES, archive_size=16)
  return search.init(KEY), quickly(search.ask)


@pytest.mark.parametrize(
  'choices',
  [
    np.full(NODES, 0, np.int32),
    np.full(NODES, 2, np.int32),
    np.full(NODES, 99, np.int32),
    np.full(NODES, -5, np.int8),
    np.full(NODES, 255, np.uint8),
  ],
)
@pytest.mark.parametrize('screened', [True, False])
def test_what_is_not_allowed_is_never_asked(choices, screened):
  state, ask = compiled(screened)
  asked, _ = ask(KEY, state._replace(species=(choices,)))
  check_allowed(PROBLEM, asked)


def test_a_species_of_another_problem_asks_nothing_that_is_not_allowed():
  stray = lambda problem, size: species_lib.find('direct')(PROBLEM, size)
  search = nemo.make(OTHER, [stray], PLACES, surrogate=None, archive_size=16)
  asked, _ = quickly(search.ask)(KEY, search.init(KEY))
  check_allowed(OTHER, asked)


@pytest.mark.parametrize(
  ('choices', 'words'),
  [
    (np.zeros(NODES), 'the type is float32; give whole numbers'),
    (np.zeros(NODES - 1, np.int32), r'the shape is \(8, 4\); give \[Q, 5\]'),
  ],
)
def test_proposals_that_are_no_choices_are_refused(choices, words):
  search = nemo.make(PROBLEM, diaries.fixed(stubborn(choices)), PLACES)
  with pytest.raises(InputError, match=words):
    jax.eval_shape(search.ask, KEY, jax.eval_shape(search.init, KEY))
