"""NEMO's generation, on a problem that has nothing to do with quantization."""

import functools
import itertools

import jax
import jax.numpy as jnp
import moocore
import numpy as np
import pytest

from nemo_jax.search import nemo, progress
from nemo_jax.search import species as species_lib
from tests import placement
from tests.search import diaries
from tests.search.compiling import quickly
from tests.search.diaries import SIZE, living

PROBLEM = diaries.moody(placement.placement_problem())
# One of every kind; test_species has them all.
TEAM = ('direct', 'gcn', 'lagrangian')
GENERATIONS = 12
KEY = jax.random.key(1)
volume = jax.jit(functools.partial(progress.hypervolume, PROBLEM))


def in_mood(mood):
  return diaries.in_mood(placement.placement_problem(), mood)


@pytest.fixture(scope='module')
def search():
  team = species_lib.team(TEAM).values()
  # Of a front that is larger than this, points would be lost.
  return nemo.make(PROBLEM, team, SIZE, archive_size=256)


@pytest.fixture(scope='module')
def start(search):
  return search.init(jax.random.key(0))


@pytest.fixture(scope='module')
def step(search):
  """One program for all tests here; its arguments are as those of `step`."""
  return quickly(search.step)


@pytest.fixture(scope='module')
def history(start, step):
  """States and metrics of some generations of the team."""
  states, metrics = [start], []
  for _ in range(GENERATIONS):
    state, measured = step(KEY, states[-1], PROBLEM.data)
    states.append(state)
    metrics.append(measured)
  return states, metrics


def test_the_team_searches_a_problem_of_another_kind(history):
  states, metrics = history
  assert metrics[-1]['hypervolume'] > metrics[0]['hypervolume']
  assert int(states[-1].evaluations.sum()) == GENERATIONS * SIZE
  assert int(metrics[-1]['failures']) == 0


def test_the_population_holds_what_its_choices_cost(history):
  for state in history[0][1:]:
    alive = living(state.population)
    assert alive.sum() >= SIZE // 2
    truth = diaries.objectives_of(PROBLEM, state.population.choices)
    np.testing.assert_allclose(
      state.population.objectives[alive], truth[alive], rtol=1e-6
    )


def test_the_archive_is_a_front_and_only_grows_better(history):
  before = 0.0
  for state in history[0][1:]:
    filled = living(state.archive)
    points = np.asarray(state.archive.objectives, np.float64)[filled]
    assert moocore.is_nondominated(points, keep_weakly=False).all()
    truth = diaries.objectives_of(PROBLEM, state.archive.choices)
    np.testing.assert_allclose(points, truth[filled], rtol=1e-6)
    new = float(volume(state.archive.objectives, filled))
    assert new >= before - 1e-6
    before = new


def test_sizes_add_up_and_rows_of_a_species_lie_together(history):
  for measured, state in zip(history[1], history[0][1:], strict=True):
    sizes = np.asarray(measured['allocation'])
    assert sizes.sum() == SIZE
    assert sizes.min() >= 2
    owners = np.repeat(np.arange(len(TEAM)), sizes)
    np.testing.assert_array_equal(state.population.species, owners)


def test_metrics_agree_with_the_state(history):
  state, measured = history[0][-1], history[1][-1]
  filled = living(state.archive)
  owners = np.asarray(state.archive.species)[filled]
  share = np.bincount(owners, minlength=len(TEAM)) / filled.sum()
  np.testing.assert_allclose(measured['front_share'], share, rtol=1e-6)
  points = (state.archive.objectives - PROBLEM.ideal) / (
    PROBLEM.reference - PROBLEM.ideal
  )
  exact = moocore.hypervolume(np.asarray(points)[filled], ref=np.ones(3))
  np.testing.assert_allclose(measured['hypervolume'], exact, rtol=1e-4)
  assert int(measured['front_size']) == filled.sum()
  best = np.asarray(state.archive.objectives)[filled].min(axis=0)
  np.testing.assert_array_equal(measured['best'], best)


def test_nothing_is_alive_twice(history):
  for state in history[0][1:]:
    rows = np.asarray(state.population.choices)[living(state.population)]
    assert len(np.unique(rows, axis=0)) == len(rows)


def test_what_is_evaluated_is_new_and_remembered(history):
  states = history[0]
  for before, after in itertools.pairwise(states):
    new = np.asarray(after.surrogate.seen.choices)[-SIZE:]
    assert living(after.surrogate.seen)[-SIZE:].all()
    old = np.concatenate(
      [
        rows.choices[living(rows)]
        for rows in (before.population, before.archive)
      ]
    )
    assert not (new[:, None] == old).all(axis=-1).any()
    assert len(np.unique(new, axis=0)) == SIZE
  known = living(states[-1].surrogate.seen)
  assert known.sum() == GENERATIONS * SIZE


def test_evaluations_of_a_species_are_its_sizes_added_up(history):
  states = history[0]
  sizes = [np.bincount(state.population.species) for state in states]
  done = [np.asarray(state.evaluations) for state in states]
  assert done[1].sum() == SIZE
  # To begin with the surrogate gives places to whatever promises most.
  np.testing.assert_array_equal(np.diff(done, axis=0)[1:], sizes[1:-1])


def test_one_trace_serves_a_run_and_its_restored_copy(history, step):
  states, _ = history
  for before, after in ((states[0], states[1]), (states[5], states[6])):
    restored = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), before)
    again, _ = step(KEY, restored, PROBLEM.data)
    jax.tree.map(np.testing.assert_array_equal, again, after)
  assert step._cache_size() == 1


def test_a_nan_is_counted_and_never_becomes_a_solution(start, step):
  state = start
  for _ in range(4):
    state, measured = step(KEY, state, in_mood(diaries.SICK))
    assert not np.isnan(state.archive.objectives).any()
    assert not np.isnan(measured['hypervolume'])
    rows = np.asarray(state.archive.choices)[living(state.archive)]
    assert (rows[:, 0] != rows[:, 1]).all()
  assert int(measured['failures']) > 0
  assert int(measured['front_size']) > 0


def test_a_search_in_which_everything_fails_goes_on(start, step):
  state = start
  for _ in range(3):
    state, measured = step(KEY, state, in_mood(diaries.DEAD))
  assert int(measured['failures']) == 3 * SIZE
  assert int(measured['front_size']) == 0
  assert int(measured['allocation'].sum()) == SIZE
  # And finds something once it can.
  state, measured = step(KEY, state, in_mood(diaries.WELL))
  assert int(measured['failures']) == 3 * SIZE
  assert int(measured['front_size']) > 0


def test_no_two_leaves_of_a_new_state_share_a_buffer(start):
  """Or it could not be donated."""
  leaves = [x for x in jax.tree.leaves(start) if x.size]
  pointers = {x.unsafe_buffer_pointer() for x in leaves}
  assert len(pointers) == len(leaves)


# At length.


@pytest.mark.slow
def test_a_run_is_traced_once():
  plain = placement.placement_problem().replace(known_objectives=None)
  team = species_lib.team(['floor', 'gcn:SNES']).values()
  search = nemo.make(plain, team, SIZE)
  counted = quickly(lambda key, state: search.step(key, state)[0])
  state = search.init(jax.random.key(0))
  for _ in range(3):
    state = counted(KEY, state)
  assert counted._cache_size() == 1


@pytest.mark.slow
def test_scan_over_generations_and_vmap_over_seeds():
  plain = placement.placement_problem().replace(known_objectives=None)
  team = species_lib.team(['direct', 'gcn']).values()
  search = nemo.make(plain, team, SIZE, archive_size=64)

  def run(key):
    advance = lambda state, _: search.step(key, state)
    return jax.lax.scan(advance, search.init(key), length=5)

  keys = jax.random.split(jax.random.key(7), 3)
  states, metrics = quickly(jax.vmap(run))(keys)
  assert metrics['hypervolume'].shape == (3, 5)
  assert np.all(np.diff(metrics['hypervolume'], axis=1) >= -1e-6)
  single, _ = quickly(run)(keys[1])
  np.testing.assert_array_equal(
    states.archive.choices[1], single.archive.choices
  )


@pytest.mark.slow
def test_the_step_finds_the_exact_front_of_a_small_problem():
  small = placement.placement_problem(nodes=7)
  team = species_lib.team(['direct', 'gcn', 'boltzmann']).values()
  search = nemo.make(small, team, 40, archive_size=512)
  state, step = search.init(jax.random.key(0)), quickly(search.step)
  for _ in range(30):
    state, measured = step(KEY, state)
  truth = placement.brute_force_front(small)
  best = progress.hypervolume(small, jnp.asarray(truth, jnp.float32))
  assert measured['hypervolume'] > 0.99 * best
  assert measured['hypervolume'] < best + 1e-5
