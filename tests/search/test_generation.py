"""A generation in two halves: who lives on, and what is counted."""

import functools

import jax
import jax.numpy as jnp
import moocore
import numpy as np
import pytest

from nemo_jax.core.types import InputError
from nemo_jax.search import nemo
from nemo_jax.search.problem import Population
from tests.placement import placement_problem
from tests.search import diaries
from tests.search.compiling import quickly
from tests.search.diaries import SIZE, living

PROBLEM = placement_problem()
SPECIES, GENERATIONS = 3, 10
KEY = jax.random.key(3)
price = jax.jit(jax.vmap(PROBLEM.evaluate, in_axes=(None, 0)))


def make(problem):
  """Without a surrogate, which is not the subject and long to compile."""
  return nemo.make(
    problem,
    diaries.diarists(SPECIES),
    SIZE,
    surrogate=None,
    exploration=0.1,
    partitions=4,
    archive_size=256,
  )


@pytest.fixture(scope='module')
def search():
  """It has no data, for it is told the objectives."""
  return make(PROBLEM.replace(data=None))


@pytest.fixture(scope='module')
def ask(search):
  return quickly(search.ask)


@pytest.fixture(scope='module')
def tell(search):
  return quickly(search.tell)


@pytest.fixture(scope='module')
def history(search, ask, tell):
  """States, what was asked after each, and metrics."""
  states, questions, metrics = [search.init(jax.random.key(0))], [], []
  for _ in range(GENERATIONS):
    asked, state = ask(KEY, states[-1])
    objectives = price(PROBLEM.data, asked.choices)
    state, measured = tell(KEY, state, asked, objectives)
    states.append(state)
    questions.append(asked)
    metrics.append(measured)
  return states, questions, metrics


def test_what_is_scored_elsewhere_is_a_step(history):
  states, _, metrics = history
  step, state = quickly(make(PROBLEM).step), states[0]
  for expected, told in zip(states[1:4], metrics, strict=False):
    state, measured = step(KEY, state)
    diaries.assert_same(state, expected)
    assert measured.keys() == told.keys()
    for name, value in told.items():
      np.testing.assert_allclose(measured[name], value, rtol=1e-5)


def test_genotypes_follow_their_rows_through_every_change_of_size(history):
  for state in history[0][1:]:
    for i, diary in enumerate(state.species):
      own = np.asarray(diary.own)
      np.testing.assert_array_equal(own, state.population.species == i)
      propose = functools.partial(diaries.choices_of, PROBLEM, i)
      expected = jax.vmap(propose)(diary.parents)
      np.testing.assert_array_equal(
        expected[own], state.population.choices[own]
      )
  sizes = {tuple(m['allocation'].tolist()) for m in history[2]}
  assert len(sizes) > 1, 'the sizes never moved'


def test_evaluations_of_a_species_are_its_sizes_added_up(history):
  states = history[0]
  sizes = [np.bincount(state.population.species) for state in states]
  done = [np.asarray(state.evaluations) for state in states]
  assert done[0].sum() == 0
  np.testing.assert_array_equal(np.diff(done, axis=0), sizes[:-1])


def test_survivors_are_the_best_of_their_species(history):
  for before, asked, after in zip(
    history[0], history[1], history[0][1:], strict=False
  ):
    new = price(PROBLEM.data, asked.choices)
    new = Population(asked.choices, new, asked.proposer)
    pool = jax.tree.map(
      lambda a, b: np.concatenate([a, b]), before.population, new
    )
    pool = jax.tree.map(lambda x, pool=pool: x[living(pool)], pool)
    place = {row.tobytes(): i for i, row in enumerate(pool.choices)}
    assert len(place) == len(pool.choices), 'a row is there twice'
    front = moocore.pareto_rank(np.asarray(pool.objectives, np.float64))
    alive, rank = living(after.population), np.asarray(after.species[0].rank)
    for i in range(SPECIES):
      own = np.asarray(after.population.species) == i
      rows = np.asarray(after.population.choices)[own & alive]
      kept = [place[row.tobytes()] for row in rows]
      mine = np.flatnonzero(pool.species == i)
      # As many as there are places for, the best of them and the best first.
      assert len(kept) == min(own.sum(), len(mine))
      assert np.isin(kept, mine).all()
      lost = np.setdiff1d(mine, kept)
      assert front[kept].max() <= front[lost].min(initial=len(front))
      assert (np.diff(rank[own & alive]) > 0).all()


# What fails, and what is counted.


@pytest.mark.parametrize('bad', [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_is_a_failure_and_never_a_solution(
  search, ask, tell, bad
):
  asked, state = ask(KEY, search.init(jax.random.key(0)))
  values = np.array(price(PROBLEM.data, asked.choices))
  values[::4, 1] = bad
  state, measured = tell(KEY, state, asked, values)
  assert int(measured['failures']) == SIZE // 4
  assert int(state.failures) == SIZE // 4
  for rows in (state.archive, state.population):
    assert (rows.objectives[~living(rows)] == np.inf).all()
  front = np.asarray(state.archive.choices)[living(state.archive)]
  lost = np.asarray(asked.choices)[::4]
  assert not (front[:, None] == lost).all(axis=-1).any()
  assert np.isfinite(measured['best']).all()


def test_counts_stop_at_the_largest_number(search, ask, tell):
  most = 2**31 - 1
  state = search.init(jax.random.key(0))._replace(
    evaluations=jnp.array([most - 3, most, most], jnp.int32),
    failures=jnp.asarray(most, jnp.int32),
  )
  asked, state = ask(KEY, state)
  dead = np.full((SIZE, 3), np.nan, np.float32)
  state, measured = tell(KEY, state, asked, dead)
  np.testing.assert_array_equal(state.evaluations, [most] * SPECIES)
  assert int(state.failures) == most
  # Of equal worth, they have equal shares.
  assert sorted(measured['allocation'].tolist()) == [5, 5, 6]


def test_objectives_of_another_shape_are_refused(history, search):
  asked, state = history[1][0], history[0][0]
  for shape in [(1, 3), (SIZE, 2), (SIZE,)]:
    with pytest.raises(InputError, match='what was asked for has') as caught:
      search.tell(KEY, state, asked, np.zeros(shape))
    assert f'objectives have shape {shape}' in str(caught.value)


# Other numbers of objectives.


def with_objectives(count):
  """The problem with so many of its objectives, over and over."""
  tile = lambda x: jnp.tile(x, 2)[:count]
  return PROBLEM.replace(
    evaluate=lambda data, c: tile(PROBLEM.evaluate(data, c)),
    ideal=tile(PROBLEM.ideal),
    reference=tile(PROBLEM.reference),
    known_objectives=None,
  )


def test_a_search_of_one_objective():
  one = with_objectives(1)
  search = nemo.make(
    one, diaries.diarists(1), 8, surrogate=None, partitions=1, archive_size=4
  )
  state, step, last = search.init(KEY), quickly(search.step), np.inf
  for _ in range(3):
    state, measured = step(KEY, state)
    assert int(measured['front_size']) == 1
    assert measured['best'][0] <= last
    last = measured['best'][0]
  best = price(PROBLEM.data, state.archive.choices[:1])[0, 0]
  np.testing.assert_allclose(last, best, rtol=1e-6)


def test_two_objectives_have_a_hypervolume_and_four_do_not():
  for count in (2, 4):
    search = make(with_objectives(count))
    state = jax.eval_shape(search.init, KEY)
    _, measured = jax.eval_shape(search.step, KEY, state)
    assert ('hypervolume' in measured) == (count == 2)
