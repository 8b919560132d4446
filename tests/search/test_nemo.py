"""NEMO's generation, on a problem that has nothing to do with quantization."""

import functools
from typing import NamedTuple

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import moocore
import numpy as np
import pytest

from nemo_jax.search import nemo, surrogate
from nemo_jax.search import species as species_lib
from nemo_jax.search.problem import Species
from tests import placement

SIZE = 16
# What takes time here is to compile.
quickly = functools.partial(
  jax.jit, compiler_options={'xla_backend_optimization_level': 0}
)
step = quickly(nemo.step, static_argnames=('species', 'partitions', 'screen'))


class Diary(NamedTuple):
  """A species' genotypes: a number for each proposal it ever made."""

  parents: jax.Array  # [P] int32
  asked: jax.Array  # [P] int32
  made: jax.Array  # int32[]
  feedback_rank: jax.Array
  own: jax.Array


def diarist(problem, size=SIZE, seed=0):
  """Choices drawn from the number of a proposal, so that both must agree."""
  nodes, _ = problem.allowed.shape
  logits = jnp.where(problem.allowed, 0.0, -jnp.inf)

  def choices_of(number):
    key = jax.random.fold_in(jax.random.key(seed), number)
    return jax.random.categorical(key, logits).astype(jnp.int32)

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
    return jax.vmap(choices_of)(asked), state

  def tell(key, state, feedback):
    del key
    both = jnp.concatenate([state.parents, state.asked])
    return state._replace(
      parents=both[feedback.source],
      feedback_rank=feedback.rank,
      own=feedback.own,
    )

  return Species(init, ask, tell), choices_of


@pytest.fixture(scope='module')
def problem():
  return placement.placement_problem()


@pytest.fixture(scope='module')
def plain():
  """The same, but that nothing can be foretold of it."""
  return placement.placement_problem().replace(costs=None)


@pytest.fixture(scope='module')
def team(problem):
  """One of every kind; tests/test_species.py has them all."""
  names = ('direct', 'gcn', 'lagrangian')
  return tuple(species_lib.find(n)(problem, SIZE) for n in names)


@pytest.fixture(scope='module')
def history(problem, team):
  """States and metrics of twelve generations of the team."""
  # Of a front that is larger than this, points would be lost.
  state = nemo.init(jax.random.key(0), problem, team, SIZE, archive_size=256)
  states, metrics = [state], []
  for _ in range(12):
    state, measured = step(jax.random.key(1), state, problem, team)
    states.append(state)
    metrics.append(measured)
  return states, metrics


def objectives_of(problem, choices):
  return jax.vmap(lambda c: problem.evaluate(problem.data, c))(choices)


def test_the_team_searches_a_problem_of_another_kind(history, problem):
  states, metrics = history
  assert metrics[-1]['hypervolume'] > metrics[0]['hypervolume']
  assert int(states[-1].evaluations.sum()) == 12 * SIZE
  assert int(metrics[-1]['failures']) == 0


def test_the_population_holds_what_its_choices_cost(history, problem):
  for state in history[0][1:]:
    living = np.isfinite(state.population.objectives).all(axis=1)
    assert living.sum() >= SIZE // 2
    truth = objectives_of(problem, state.population.choices)
    np.testing.assert_allclose(
      state.population.objectives[living], truth[living], rtol=1e-6
    )


@pytest.mark.slow
def test_the_archive_is_a_front_and_only_grows_better(history, problem):
  volume = 0.0
  for state in history[0][1:]:
    filled = np.isfinite(state.archive.objectives).all(axis=1)
    points = np.asarray(state.archive.objectives[filled], np.float64)
    assert moocore.is_nondominated(points, keep_weakly=False).all()
    truth = objectives_of(problem, state.archive.choices[filled])
    np.testing.assert_allclose(points, truth, rtol=1e-6)
    new = float(nemo.hypervolume(problem, state.archive.objectives, filled))
    assert new >= volume - 1e-6
    volume = new


def test_sizes_add_up_and_rows_of_a_species_lie_together(history):
  for measured, state in zip(history[1], history[0][1:], strict=True):
    assert int(measured['allocation'].sum()) == SIZE
    assert int(measured['allocation'].min()) >= 2
    assert np.all(np.diff(state.population.species) >= 0)


@pytest.mark.parametrize('screen', [False, True])
def test_evaluations_of_a_species_are_its_sizes_added_up(problem, screen):
  team = tuple(diarist(problem, seed=seed)[0] for seed in range(3))
  state = nemo.init(jax.random.key(0), problem, team, SIZE)
  sizes, done = [np.bincount(state.population.species)], []
  for _ in range(5):
    state, measured = step(
      jax.random.key(3), state, problem, team, screen=screen
    )
    sizes.append(np.asarray(measured['allocation']))
    done.append(np.asarray(state.evaluations))
  assert done[0].sum() == SIZE
  # To begin with a screen gives places to whatever promises most.
  first = 1 if screen else 0
  done = np.diff([np.zeros(3, int), *done], axis=0)
  np.testing.assert_array_equal(done[first:], sizes[first:-1])


def test_of_very_many_proposals_the_first_of_each_are_looked_at(
  problem, monkeypatch
):
  team = tuple(diarist(problem, seed=seed)[0] for seed in range(3))
  state = nemo.init(jax.random.key(0), problem, team, SIZE)
  looked, whole = [], surrogate.turns

  def turns(*arguments):
    jax.debug.callback(looked.append, arguments[5])  # who proposes
    return whole(*arguments)

  monkeypatch.setattr(surrogate, 'turns', turns)
  monkeypatch.setattr(surrogate, 'PROPOSALS', 1)
  state, _ = step(jax.random.key(3), state, problem, team)
  jax.effects_barrier()
  # Three species propose 16 each; of these 1.5 times the places are looked at.
  counts = np.bincount(np.asarray(looked[0]) + 1, minlength=4)
  assert sorted(counts[1:]) == [8, 8, 8]
  assert counts[0] == 0
  valid = np.isfinite(state.seen.objectives).all(axis=1)
  assert valid.sum() == SIZE
  assert len(np.unique(state.seen.choices[valid], axis=0)) == SIZE


def test_metrics_agree_with_the_state(history, problem):
  state, measured = history[0][-1], history[1][-1]
  filled = np.isfinite(state.archive.objectives).all(axis=1)
  owners = np.asarray(state.archive.species)[filled]
  count = len(state.species)
  share = np.bincount(owners, minlength=count) / filled.sum()
  np.testing.assert_allclose(measured['front_share'], share, rtol=1e-6)
  points = (state.archive.objectives - problem.ideal) / (
    problem.reference - problem.ideal
  )
  exact = moocore.hypervolume(np.asarray(points[filled]), ref=np.ones(3))
  np.testing.assert_allclose(measured['hypervolume'], exact, rtol=1e-4)
  assert int(measured['front_size']) == filled.sum()


def test_genotypes_follow_their_rows_through_every_change_of_size(plain):
  pairs = [diarist(plain, seed=s) for s in range(3)]
  team = tuple(species for species, _ in pairs)
  state = nemo.init(jax.random.key(0), plain, team, SIZE)
  sizes = set()
  for _ in range(10):
    state, measured = step(
      jax.random.key(3), state, plain, team, exploration=0.1
    )
    sizes.add(tuple(np.asarray(measured['allocation']).tolist()))
    for i, (_, choices_of) in enumerate(pairs):
      diary = state.species[i]
      own = np.asarray(diary.own)
      np.testing.assert_array_equal(own, state.population.species == i)
      expected = jax.vmap(choices_of)(diary.parents)
      np.testing.assert_array_equal(
        expected[own], state.population.choices[own]
      )
  assert len(sizes) > 1, 'the sizes never moved'


def test_survivors_are_the_best_ranked_of_their_species(plain):
  species, _ = diarist(plain)
  state = nemo.init(jax.random.key(0), plain, (species,), SIZE)
  seen = []
  for _ in range(4):
    state, _ = step(jax.random.key(3), state, plain, (species,))
    seen.append(np.asarray(state.species[0].feedback_rank))
  # One species keeps the first P of 2P: every rank below P, once.
  for rank in seen[1:]:
    finite = np.sort(rank[np.isfinite(rank)])
    np.testing.assert_array_equal(finite, np.arange(len(finite)))


def test_nothing_is_alive_twice(history):
  for state in history[0][1:]:
    living = np.isfinite(state.population.objectives).all(axis=1)
    rows = np.asarray(state.population.choices)[living]
    assert len(np.unique(rows, axis=0)) == len(rows)


def test_one_trace_serves_a_run_and_its_restored_copy(history, problem, team):
  states, _ = history
  traced = step._cache_size()
  for before, after in ((states[0], states[1]), (states[5], states[6])):
    restored = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), before)
    again, _ = step(jax.random.key(1), restored, problem, team)
    jax.tree.map(np.testing.assert_array_equal, again, after)
  assert step._cache_size() == traced


@pytest.mark.slow
def test_a_run_is_traced_once(plain):
  counted = quickly(
    lambda key, state, plain: nemo.step(key, state, plain, team)[0]
  )
  team = tuple(species_lib.find(n)(plain, SIZE) for n in ('floor', 'gcn:SNES'))
  state = nemo.init(jax.random.key(0), plain, team, SIZE)
  for _ in range(3):
    state = counted(jax.random.key(1), state, plain)
  assert counted._cache_size() == 1


@pytest.mark.slow
def test_scan_over_generations_and_vmap_over_seeds(plain):
  names = ('direct', 'gcn')
  team = tuple(species_lib.find(n)(plain, SIZE) for n in names)

  def run(key):
    state = nemo.init(key, plain, team, SIZE, archive_size=64)
    advance = lambda state, _: nemo.step(key, state, plain, team)
    return jax.lax.scan(advance, state, length=5)

  keys = jax.random.split(jax.random.key(7), 3)
  states, metrics = quickly(jax.vmap(run))(keys)
  assert metrics['hypervolume'].shape == (3, 5)
  assert np.all(np.diff(metrics['hypervolume'], axis=1) >= -1e-6)
  single, _ = quickly(run)(keys[1])
  np.testing.assert_array_equal(
    states.archive.choices[1], single.archive.choices
  )


def test_a_nan_is_counted_and_never_becomes_a_solution(problem):
  def broken(data, choices):
    good = problem.evaluate(data, choices)
    return jnp.where(choices[0] == choices[1], jnp.nan, good)

  sick = problem.replace(evaluate=broken)
  team = (species_lib.find('direct')(sick, SIZE),)
  state = nemo.init(jax.random.key(0), sick, team, SIZE)
  for _ in range(4):
    state, measured = step(jax.random.key(1), state, sick, team)
    assert not np.isnan(state.archive.objectives).any()
    assert not np.isnan(measured['hypervolume'])
    filled = np.isfinite(state.archive.objectives).all(axis=1)
    rows = np.asarray(state.archive.choices)[filled]
    assert (rows[:, 0] != rows[:, 1]).all()
  assert int(measured['failures']) > 0
  assert int(measured['front_size']) > 0


@pytest.mark.parametrize('bad', [np.inf, -np.inf])
def test_an_infinity_is_a_failure_and_never_becomes_a_solution(plain, bad):
  team, key = (diarist(plain)[0],), jax.random.key(3)
  state = nemo.init(jax.random.key(0), plain, team, SIZE)
  ask = jax.jit(nemo.ask, static_argnames='species')
  asked, state = ask(key, state, plain, team)
  values = np.array(objectives_of(plain, asked.choices))
  values[::4, 1] = bad
  tell = quickly(nemo.tell, static_argnames='species')
  state, measured = tell(key, state, plain, team, asked, values)
  assert int(measured['failures']) == SIZE // 4
  assert int(state.failures) == SIZE // 4
  for rows in (state.archive, state.population, state.seen):
    known = np.isfinite(rows.objectives).all(axis=1)
    assert (rows.objectives[~known] == np.inf).all()
  front = np.asarray(state.archive.choices)[
    np.isfinite(state.archive.objectives).all(axis=1)
  ]
  lost = np.asarray(asked.choices)[::4]
  assert not (front[:, None] == lost).all(axis=-1).any()
  assert np.isfinite(measured['best']).all()


def test_counts_stop_at_the_largest_number(plain):
  team = tuple(diarist(plain, seed=seed)[0] for seed in range(2))
  state = nemo.init(jax.random.key(0), plain, team, SIZE)
  most = 2**31 - 1
  state = state._replace(
    evaluations=jnp.array([most - 3, most], jnp.int32),
    failures=jnp.asarray(most, jnp.int32),
  )
  dead = plain.replace(evaluate=lambda data, c: jnp.full(3, jnp.nan))
  state, measured = step(jax.random.key(3), state, dead, team)
  np.testing.assert_array_equal(state.evaluations, [most, most])
  assert int(state.failures) == most
  np.testing.assert_array_equal(measured['allocation'], [SIZE // 2] * 2)


def test_allocation_does_not_wrap_where_evaluations_are_many():
  sizes = nemo.allocate(
    jnp.array([0.1, 0.1]), jnp.array([2**31 - 1, 2**20]), 100, 1.0
  )
  # sqrt(ln(2^31) / 2^20) is not nothing; of 2^31 it nearly is.
  assert sizes[1] > sizes[0]


@pytest.mark.parametrize('exploration', [np.nan, -1.0])
def test_an_exploration_below_zero_is_refused(plain, exploration):
  team, key = (diarist(plain)[0],), jax.random.key(3)
  state = nemo.init(jax.random.key(0), plain, team, SIZE)
  with pytest.raises(nemo.InputError, match='exploration is'):
    nemo.step(key, state, plain, team, exploration=exploration)


def test_a_search_of_one_objective(plain):
  one = plain.replace(
    evaluate=lambda data, c: plain.evaluate(data, c)[:1],
    ideal=plain.ideal[:1],
    reference=plain.reference[:1],
  )
  team = (diarist(one)[0],)
  state, last = nemo.init(jax.random.key(0), one, team, SIZE), np.inf
  for _ in range(3):
    state, measured = step(jax.random.key(1), state, one, team, partitions=1)
    assert int(measured['front_size']) == 1
    assert measured['best'][0] <= last
    last = measured['best'][0]
  best = objectives_of(plain, state.archive.choices[:1])[0, 0]
  np.testing.assert_allclose(last, best, rtol=1e-6)


def test_a_search_in_which_everything_fails_goes_on(problem):
  dead = problem.replace(evaluate=lambda data, c: jnp.full(3, jnp.nan))
  team = tuple(species_lib.find(n)(dead, SIZE) for n in ('direct', 'gcn'))
  state = nemo.init(jax.random.key(0), dead, team, SIZE)
  for _ in range(3):
    state, measured = step(jax.random.key(1), state, dead, team)
  assert int(measured['failures']) == 3 * SIZE
  assert int(measured['front_size']) == 0
  assert int(measured['allocation'].sum()) == SIZE


def test_two_objectives_have_a_hypervolume_and_four_do_not(plain):
  def variant(count):
    evaluate = lambda data, c: jnp.tile(plain.evaluate(data, c), 2)[:count]
    ideal = jnp.tile(plain.ideal, 2)[:count]
    reference = jnp.tile(plain.reference, 2)[:count]
    return plain.replace(evaluate=evaluate, ideal=ideal, reference=reference)

  for count in (2, 4):
    other = variant(count)
    team = (diarist(other)[0],)
    state = nemo.init(jax.random.key(0), other, team, SIZE)
    advance = functools.partial(nemo.step, species=team, partitions=4)
    _, measured = jax.eval_shape(advance, jax.random.key(1), state, other)
    assert ('hypervolume' in measured) == (count == 2)


@hypothesis.given(
  st.lists(
    st.tuples(
      st.one_of(st.floats(0.01, 10), st.just(np.inf)), st.integers(1, 10_000)
    ),
    min_size=1,
    max_size=8,
  ),
  st.sampled_from([16, 61, 200]),
  st.floats(0, 3),
)
@hypothesis.settings(deadline=None, max_examples=200)
def test_allocation_is_a_partition(scores, places, exploration):
  utility, evaluations = map(np.asarray, zip(*scores, strict=True))
  sizes = nemo.allocate(
    jnp.asarray(utility, jnp.float32),
    jnp.asarray(evaluations),
    places,
    exploration,
  )
  assert int(sizes.sum()) == places
  assert int(sizes.min()) >= 2


def test_allocation_follows_utility_and_curiosity():
  allocate = functools.partial(nemo.allocate, places=100)
  even = jnp.asarray([100, 100, 100])
  sizes = allocate(jnp.asarray([0.1, 0.2, 0.3]), even, exploration=1.0)
  assert sizes[0] > sizes[1] > sizes[2]
  same = jnp.full(3, 0.2)
  sizes = allocate(same, jnp.asarray([10, 100, 1000]), exploration=1.0)
  assert sizes[0] > sizes[1] > sizes[2]
  np.testing.assert_array_equal(
    np.sort(allocate(same, even, exploration=1.0)), [33, 33, 34]
  )
  dead = allocate(jnp.asarray([0.1, jnp.inf, 0.2]), even, exploration=0.0)
  assert int(dead[1]) == 2


def test_allocation_is_the_formula():
  utility, evaluations = np.asarray([0.1, 0.2, 0.4]), np.asarray([50, 30, 20])
  bonus = np.sqrt(np.log(100) / evaluations)
  score = (0.4 - utility) / 0.3 + 0.5 * bonus
  exact = 2 + score / score.sum() * (60 - 6)
  sizes = nemo.allocate(jnp.asarray(utility), jnp.asarray(evaluations), 60, 0.5)
  assert np.all(np.abs(np.asarray(sizes) - exact) < 1)


def test_allocation_without_an_end_of_curiosity_is_equal():
  sizes = nemo.allocate(jnp.array([0.1, 0.9, 0.5]), jnp.arange(3), 30, np.inf)
  np.testing.assert_array_equal(sizes, [10, 10, 10])


utility = jax.jit(nemo._utility, static_argnums=(0, 3, 4))


@hypothesis.given(seed=st.integers(0, 2**31 - 1))
def test_utilities_are_what_a_species_adds(seed):
  """Against moocore, with and without the rows of each of four species."""
  rng = np.random.default_rng(seed)
  values = rng.random((24, 3)).astype(np.float32)
  owner, member = rng.integers(0, 3, 24), rng.random(24) < 0.8
  rank = np.where(member, moocore.pareto_rank(values), 99)
  front = member & moocore.is_nondominated(
    np.where(member[:, None], values, 2.0), keep_weakly=True
  )
  rank = np.where(front, 0, np.maximum(rank, 1))
  find = lambda kind: utility(kind, values, owner, 4, None, member, rank)
  volumes, counts = find('hypervolume'), find('front_count')
  volume = lambda mask: moocore.hypervolume(values[mask], ref=[1, 1, 1])
  for i in range(4):
    own = owner == i
    if not (own & member).any():
      assert np.isinf(volumes[i])
      assert np.isinf(counts[i])
      continue
    added = volume(member) - volume(member & ~own)
    assert volumes[i] == pytest.approx(-added, abs=1e-5)
    assert counts[i] == -(own & front).sum()


def test_an_unknown_utility_lists_the_known(problem, team):
  state = nemo.init(jax.random.key(0), problem, team, SIZE)
  with pytest.raises(nemo.InputError, match="'luck'; the choices are r2, hy"):
    nemo.step(jax.random.key(0), state, problem, team, utility='luck')


def test_too_small_a_population_is_refused(problem, team):
  short, needed = 2 * len(team) - 1, len(team)
  words = f'population of {short} is too small for {needed} species'
  with pytest.raises(nemo.InputError, match=words):
    nemo.init(jax.random.key(0), problem, team, short)


@pytest.mark.parametrize('name', ['direct', 'gcn'])
def test_species_made_for_another_population_are_refused(problem, name):
  team = (species_lib.find(name)(problem, 8),)
  state = nemo.init(jax.random.key(0), problem, team, SIZE)
  with pytest.raises(
    ValueError, match='for a population of 8; this one has 16'
  ):
    step(jax.random.key(1), state, problem, team)


@pytest.mark.slow
def test_the_step_finds_the_exact_front_of_a_small_problem():
  small = placement.placement_problem(nodes=7)
  team = tuple(
    species_lib.find(n)(small, 40) for n in ('direct', 'gcn', 'boltzmann')
  )
  state = nemo.init(jax.random.key(0), small, team, 40, archive_size=512)
  for _ in range(30):
    state, measured = step(jax.random.key(1), state, small, team)
  truth = placement.brute_force_front(small)
  best = nemo.hypervolume(small, jnp.asarray(truth, jnp.float32))
  assert measured['hypervolume'] > 0.99 * best
  assert measured['hypervolume'] < best + 1e-5


def assert_same(state, other):
  np.testing.assert_array_equal(state.archive.choices, other.archive.choices)
  np.testing.assert_array_equal(
    state.population.choices, other.population.choices
  )
  np.testing.assert_allclose(
    state.archive.objectives, other.archive.objectives, rtol=1e-6
  )


def test_what_is_scored_elsewhere_is_a_step(plain):
  team = tuple(diarist(plain, seed=seed)[0] for seed in range(2))
  key, blind = jax.random.key(3), plain.replace(data=None)
  state = one = nemo.init(jax.random.key(0), plain, team, SIZE)
  ask = jax.jit(nemo.ask, static_argnames='species')
  tell = jax.jit(nemo.tell, static_argnames='species')
  for _ in range(3):
    one, expected = step(key, one, plain, team)
    asked, state = ask(key, state, blind, team)
    rows = [plain.evaluate(plain.data, row) for row in asked.choices]
    state, metrics = tell(key, state, blind, team, asked, np.stack(rows))
    assert_same(state, one)
    np.testing.assert_allclose(metrics['r2'], expected['r2'], rtol=1e-5)


def test_objectives_of_another_shape_are_refused(plain):
  team, key = (diarist(plain)[0],), jax.random.key(3)
  state = nemo.init(jax.random.key(0), plain, team, SIZE)
  ask = jax.jit(nemo.ask, static_argnames='species')
  asked, state = ask(key, state, plain, team)
  with pytest.raises(nemo.InputError, match=r'shape \(1, 3\); what was asked'):
    nemo.tell(key, state, plain, team, asked, np.zeros((1, 3)))


def test_a_compiled_step_is_a_step_and_uses_up_its_state(plain):
  team = tuple(diarist(plain, seed=seed)[0] for seed in range(2))
  sick = plain.replace(
    evaluate=lambda data, row: jnp.where(
      row[0] == 1, jnp.nan, plain.evaluate(data, row)
    )
  )
  key = jax.random.key(3)
  state = nemo.init(jax.random.key(0), sick, team, SIZE)
  expected, _ = step(key, state, sick, team)
  advance, program = nemo.compile_step(key, state, sick, team)
  assert program.memory_analysis().output_size_in_bytes > 0
  found, _ = advance(state)
  assert state.population.choices.is_deleted()
  assert found.failures == expected.failures > 0
  assert_same(found, expected)


def test_no_two_leaves_of_a_new_state_share_a_buffer(problem, team):
  """Or it could not be donated."""
  state = nemo.init(jax.random.key(0), problem, team, SIZE)
  leaves = [x for x in jax.tree.leaves(state) if x.size]
  pointers = {x.unsafe_buffer_pointer() for x in leaves}
  assert len(pointers) == len(leaves)


def listened(problem):
  """A species, and what it is called for: `ask` or `ask_more`."""
  one, called = diarist(problem)[0], []

  def noted(word):
    def ask(key, state):
      called.append(word)
      return one.ask(key, state)

    return ask

  return one._replace(ask=noted('ask'), ask_more=noted('ask_more')), called


@pytest.mark.parametrize(
  ('name', 'screen', 'word'),
  [
    ('problem', True, 'ask_more'),
    ('problem', False, 'ask'),
    ('plain', True, 'ask'),
  ],
)
def test_species_propose_as_the_search_screens(request, name, screen, word):
  problem = request.getfixturevalue(name)
  one, called = listened(problem)
  state = nemo.init(jax.random.key(0), problem, (one,), SIZE)
  ask = functools.partial(nemo.ask, species=(one,), screen=screen)
  jax.eval_shape(ask, jax.random.key(3), state, problem)
  assert called == [word]


def test_a_compiled_step_without_a_screen_is_a_step_without(problem):
  one, called = listened(problem)
  key, team = jax.random.key(3), (one,)
  state = nemo.init(jax.random.key(0), problem, team, SIZE)
  expected, _ = step(key, state, problem, team, screen=False)
  advance, _ = nemo.compile_step(key, state, problem, team, screen=False)
  assert set(called) == {'ask'}
  assert_same(advance(state)[0], expected)
