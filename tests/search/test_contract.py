"""Problems that do not fit together, and species of another problem."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemo_jax.core.types import InputError
from nemo_jax.search import contract, nemo
from nemo_jax.search import species as species_lib
from nemo_jax.search.problem import Species
from tests import placement

PLACES = 8
PROBLEM = placement.placement_problem(5)
NODES, CHOICES = PROBLEM.allowed.shape
KEY = jax.random.key(0)
# As PROBLEM, but that a node has one choice.
OTHER = PROBLEM.replace(
  allowed=PROBLEM.allowed.at[1].set(jnp.array([False, True, False]))
)


def stubborn(choices) -> Species:
  """It proposes the same choices in every row."""
  rows = jnp.broadcast_to(jnp.asarray(choices), (PLACES, len(choices)))
  return Species(
    init=lambda key: (),
    ask=lambda key, state: (rows, state),
    tell=lambda key, state, feedback: state,
  )


def graph(**changes):
  return {'graph': PROBLEM.graph._replace(**changes)}


def estimate(**changes):
  return {'estimate': PROBLEM.prior._replace(**changes)}


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
    (estimate(loss=PROBLEM.prior.loss[:2]), 'estimate.loss: the shape'),
    (estimate(costs=PROBLEM.prior.costs * np.inf), 'costs holds values'),
    (estimate(pairs=PROBLEM.prior.pairs - 1), 'pairs names a node'),
    (
      estimate(pair_costs=PROBLEM.prior.pair_costs[..., :1]),
      r'pair_costs: the shape is \(4, 3, 3, 1\); give \[4, 3, 3, 3\]',
    ),
  ],
)
def test_a_problem_that_does_not_fit_together_is_refused(changes, words):
  with pytest.raises(InputError, match=words) as caught:
    nemo.init(KEY, PROBLEM.replace(**changes), (stubborn([1] * NODES),), PLACES)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
  'changes', [{'graph': None}, {'estimate': None}, {'data': None}]
)
def test_what_a_search_can_do_without_may_be_absent(changes):
  contract.check_problem(PROBLEM.replace(**changes))


@pytest.mark.parametrize('size', [0, -1, 2.5, None])
def test_an_archive_without_slots_is_refused(size):
  with pytest.raises(InputError, match='archive_size is .*; give a whole num'):
    nemo.init(KEY, PROBLEM, (stubborn([1] * NODES),), PLACES, size)


@pytest.mark.parametrize('name', species_lib.names())
def test_species_of_another_problem_are_refused(name):
  team = (species_lib.find(name)(PROBLEM, PLACES),)
  state = nemo.init(KEY, PROBLEM, team, PLACES)
  words = 'species 0 was made for a problem with another graph'
  with pytest.raises(InputError, match=words):
    nemo.init(KEY, OTHER, team, PLACES)
  with pytest.raises(InputError, match=words):
    nemo.ask(KEY, state, OTHER, team)
  with pytest.raises(InputError, match=words):
    nemo.compile_step(KEY, state, OTHER, team)


@pytest.mark.parametrize(
  'change',
  [
    {'allowed': PROBLEM.allowed[:4]},
    graph(nodes=PROBLEM.graph.nodes + 1),
    estimate(loss=PROBLEM.prior.loss + 1),
    {'estimate': None},
  ],
)
def test_whatever_a_species_is_made_of_tells_problems_apart(change):
  assert contract.fingerprint(PROBLEM.replace(**change)) != (
    contract.fingerprint(PROBLEM)
  )


def test_the_same_problem_elsewhere_is_the_same():
  own = contract.fingerprint(PROBLEM)
  moved = jax.tree.map(np.asarray, PROBLEM).replace(data=None, mesh=None)
  assert contract.fingerprint(moved) == own
  wide = jax.tree.map(
    lambda x: x if x.dtype == bool else x.astype(x.dtype.kind + '8'), moved
  )
  assert contract.fingerprint(wide) == own
  assert contract.fingerprint(PROBLEM.replace(costs=None)) == own
  seen = []
  jax.eval_shape(lambda p: seen.append(contract.fingerprint(p)), PROBLEM)
  assert seen == [None]


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
@pytest.mark.parametrize('problem', [PROBLEM, PROBLEM.replace(costs=None)])
def test_what_is_not_allowed_is_never_asked(choices, problem):
  team = (stubborn(choices),)
  state = nemo.init(KEY, problem, team, PLACES)
  asked, _ = nemo.ask(KEY, state, problem, team)
  for rows in (asked.choices, asked.proposed):
    assert np.asarray(problem.allowed)[np.arange(NODES), rows].all()


def test_a_traced_search_never_asks_what_is_not_allowed():
  """Where it cannot be told that the species is of another problem."""
  team = (species_lib.find('direct')(PROBLEM, PLACES),)
  state = nemo.init(KEY, PROBLEM, team, PLACES)
  ask = jax.jit(nemo.ask, static_argnames='species')
  asked, _ = ask(KEY, state, OTHER, team)
  assert np.asarray(OTHER.allowed)[np.arange(NODES), asked.choices].all()


@pytest.mark.parametrize(
  ('choices', 'words'),
  [
    (np.zeros(NODES), 'the type is float32; give whole numbers'),
    (np.zeros(NODES - 1, np.int32), r'the shape is \(8, 4\); give \[Q, 5\]'),
  ],
)
def test_proposals_that_are_no_choices_are_refused(choices, words):
  team = (stubborn(choices),)
  state = nemo.init(KEY, PROBLEM, team, PLACES)
  with pytest.raises(InputError, match=words):
    nemo.ask(KEY, state, PROBLEM, team)
