"""What is foretold of evaluations, and what is chosen by it."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from sklearn import gaussian_process
from sklearn.gaussian_process import kernels

from nemo_jax import pareto
from nemo_jax.search import progress, screening, surrogate
from nemo_jax.search.problem import Population
from tests.placement import placement_problem

PROBLEM = placement_problem(9)
NODES, CHOICES = PROBLEM.allowed.shape
ROWS, MEMORY = 40, 60
learn = jax.jit(surrogate.learn)
believe = jax.jit(lambda *args: surrogate.believe(surrogate.learn(*args)))
expect = jax.jit(surrogate.expect)
draw_factors = jax.jit(surrogate.draw_factors, static_argnums=3)
rounds = jax.jit(
  lambda key, belief, archive, rows, proposer, places, count: surrogate.rounds(
    key, PROBLEM, belief, archive, rows, proposer, places, count
  ),
  static_argnums=6,
)
score = jax.jit(jax.vmap(PROBLEM.evaluate, in_axes=(None, 0)))


def placements(seed, count=ROWS):
  logits = np.where(PROBLEM.allowed, 0.0, -np.inf)
  key = jax.random.key(seed)
  rows = jax.random.categorical(key, logits, shape=(count, NODES))
  return rows.astype(jnp.int32)


def evaluated(rows, memory=MEMORY):
  """The rows as they are remembered, behind empty ones."""
  empty = pareto.empty_population(memory, NODES, 3)
  owner = jnp.zeros(len(rows), jnp.int32)
  done = Population(rows, score(PROBLEM.data, rows), owner)
  return surrogate.remember(jax.random.key(0), empty, done)


def expected(seen, rows):
  """Of rows, from what was seen of others."""
  return expect(PROBLEM, believe(PROBLEM, seen), rows)


def logarithm(rows):
  """What `expect` foretells."""
  scaled = progress.scale(PROBLEM, score(PROBLEM.data, rows))[:, 0]
  return np.log(np.maximum(scaled, 0) + surrogate.FLOOR)


def kernel(one, two):
  """By the formula, element by element."""
  value = surrogate.CONSTANT**2 + surrogate.SLOPE**2 * one[0] * two[0]
  value += surrogate.BEND**2 * np.exp(-((one[0] - two[0]) ** 2) / 2)
  value += surrogate.NODE**2 * np.dot(one[1], two[1])
  return value + surrogate.CHOICE**2 * np.dot(one[2], two[2])


def test_the_posterior_is_that_of_scikit_learn():
  past, new = placements(0), placements(1)
  table = lambda rows: np.asarray(
    jnp.concatenate(
      [x.reshape(len(rows), -1) for x in surrogate.features(PROBLEM, rows)], 1
    ),
    np.float64,
  )
  split = lambda x: (x[0], x[1 : 1 + NODES], x[1 + NODES :])
  pairwise = kernels.PairwiseKernel(
    metric=lambda a, b, gamma: kernel(split(a), split(b))
  )
  peer = gaussian_process.GaussianProcessRegressor(
    pairwise, alpha=surrogate.NOISE**2, optimizer=None
  )
  x, z = table(past), table(new)
  peer.fit(x, logarithm(past) - x[:, 0])
  mean = peer.predict(z) + z[:, 0]
  found = expected(evaluated(past), new)
  np.testing.assert_allclose(found, mean, rtol=2e-3, atol=2e-3)


def test_nothing_seen_is_what_is_believed_at_first():
  first, new = surrogate.nothing(PROBLEM), placements(1)
  empty = evaluated(placements(0, 0), surrogate.MEMORY)
  later = believe(PROBLEM, empty)
  assert jax.tree.map(jnp.shape, first) == jax.tree.map(jnp.shape, later)
  level = surrogate.features(PROBLEM, new).level
  for belief in (first, later):
    np.testing.assert_allclose(expect(PROBLEM, belief, new), level, rtol=1e-6)


def test_what_was_measured_makes_better_predictions():
  new = placements(1, 200)
  error = [
    np.std(expected(evaluated(placements(0, n)), new) - logarithm(new))
    for n in (2, 10, MEMORY)
  ]
  assert error[2] < 0.5 * error[0]
  assert error[2] < error[1]


def test_memory_keeps_the_last():
  old, new = evaluated(placements(0)), placements(2, 30)
  done = Population(new, score(PROBLEM.data, new), jnp.ones(30, jnp.int32))
  both = surrogate.remember(jax.random.key(0), old, done)
  np.testing.assert_array_equal(both.choices[-30:], new)
  np.testing.assert_array_equal(both.choices[:30], old.choices[30:])
  many = placements(3, 100)
  done = Population(many, score(PROBLEM.data, many), jnp.ones(100, jnp.int32))
  kept = surrogate.remember(jax.random.key(0), old, done)
  assert len(kept.choices) == MEMORY
  known = {row.tobytes() for row in np.asarray(many)}
  assert all(row.tobytes() in known for row in np.asarray(kept.choices))


def test_drawn_factors_are_those_that_explain_what_was_seen():
  """Losses that are true but for factors: draws find them."""
  truth = np.exp(np.random.default_rng(0).normal(0, 0.5, (NODES, 1)))
  loss = np.asarray(PROBLEM.prior.loss)
  wrong = PROBLEM.replace(
    prior=PROBLEM.prior._replace(loss=loss / truth),
    ideal=np.zeros(3, np.float32),
  )
  rows = placements(0, MEMORY)
  seen = evaluated(rows)
  draw = jax.jit(
    lambda key, seen: surrogate.draw_factors(
      key, wrong, surrogate.learn(wrong, seen), 64
    )
  )
  before = jnp.log(draw(jax.random.key(0), evaluated(rows[:0])))
  after = jnp.log(draw(jax.random.key(0), seen))
  assert before.shape == (64, NODES, CHOICES)
  # The prior is the sum of a node's and a choice's part.
  spread = np.hypot(surrogate.NODE, surrogate.CHOICE)
  np.testing.assert_allclose(np.std(before), spread, rtol=0.1)
  assert abs(float(np.mean(before))) < 0.05
  used = np.argmax(np.asarray(PROBLEM.allowed), axis=1)
  found = np.mean(after, axis=0)[np.arange(NODES), used]
  right = np.log(truth[:, 0])
  assert np.corrcoef(found, right)[0, 1] > 0.7
  assert np.std(after) < np.std(before)
  # Draws lie around what is believed.
  mean = believe(wrong, seen).log_factors
  spread = np.std(after, axis=0) / np.sqrt(64)
  apart = (np.mean(after, axis=0) - mean)[np.asarray(PROBLEM.allowed)]
  assert np.std(apart / spread[np.asarray(PROBLEM.allowed)]) < 1.2


def test_improvement_is_the_mean_of_its_definition():
  rng = np.random.default_rng(0)
  deviation = surrogate.NOISE
  for best, mean in [(0.2, -1.6), (0.5, -0.7), (1, -5)]:
    drawn = np.exp(rng.normal(mean, deviation, 400_000)) - surrogate.FLOOR
    truth = np.mean(np.maximum(best - drawn, 0))
    found = surrogate._improvement(best, mean)
    np.testing.assert_allclose(found, truth, rtol=0.02)


@hypothesis.given(st.integers(1, 3), st.integers(0, 9))
@hypothesis.settings(max_examples=10, deadline=None)
def test_points_are_spread_evenly(dimensions, seed):
  points = surrogate._points(jax.random.key(seed), 512, dimensions)
  assert points.shape == (512, dimensions)
  discrepancy = scipy.stats.qmc.discrepancy(np.asarray(points, np.float64))
  chance = np.random.default_rng(seed).uniform(size=(512, dimensions))
  assert discrepancy < 0.5 * scipy.stats.qmc.discrepancy(chance)


def choose(rows, proposer, places, count, seed=0, past=0):
  front = evaluated(placements(past, 20), 20)
  belief = believe(PROBLEM, evaluated(placements(past, MEMORY)))
  found = rounds(
    jax.random.key(seed), belief, front, rows, proposer, places, count
  )
  return np.asarray(found)


def test_no_species_takes_more_than_its_places():
  rows = placements(5, 90)
  proposer = jnp.repeat(jnp.arange(3), 30).at[:5].set(-1)
  turn = choose(rows, proposer, jnp.array([2, 9, 4]), 15)
  chosen = np.isfinite(turn)
  assert not chosen[:5].any()
  np.testing.assert_array_equal(
    np.bincount(np.asarray(proposer)[chosen], minlength=3), [2, 9, 4]
  )
  assert sorted(turn[chosen]) == list(range(15))


def gained(front, rows):
  """Hypervolume with the rows beside the front."""
  values = score(PROBLEM.data, rows)
  return float(
    progress.hypervolume(PROBLEM, jnp.concatenate([front.objectives, values]))
  )


def test_the_choice_gains_more_than_chance():
  gains = []
  for seed in range(5):
    rows = placements(10 + seed, 200)
    front = evaluated(placements(seed, 20), 20)
    everyone = jnp.zeros(200, jnp.int32)
    turn = choose(rows, everyone, jnp.array([10]), 10, seed, seed)
    picked = rows[np.argsort(turn)[:10]]
    gains.append(gained(front, picked) - gained(front, rows[:10]))
  assert min(gains) >= 0
  assert np.mean(gains) > 0.005


@pytest.mark.parametrize('count', [12, 3 * screening.ROUNDS])
def test_the_choice_is_the_greedy_one(count, monkeypatch):
  """What is measured lazily is chosen as if all were measured every time."""
  rows = placements(17, 2 * count)
  args = (
    jax.random.key(0),
    PROBLEM,
    believe(PROBLEM, evaluated(placements(0, 20))),
    evaluated(placements(0, 20), 20),
    rows,
    jnp.arange(len(rows)) % 3,
    jnp.full(3, count),
  )
  lazy, eager = (
    jax.jit(functools.partial(surrogate.rounds, count=count)) for _ in range(2)
  )
  found = lazy(*args)
  monkeypatch.setattr(surrogate, 'MEASURED', len(rows))
  np.testing.assert_array_equal(found, eager(*args))


def test_the_same_proposal_twice_is_chosen_once_before_others():
  rows = jnp.concatenate([placements(7, 30)] * 2)
  turn = choose(rows, jnp.zeros(60, jnp.int32), jnp.array([12]), 12)
  first = np.asarray(rows)[np.argsort(turn)[:12]]
  assert len(np.unique(first, axis=0)) == 12


def test_many_are_chosen_a_few_at_once():
  count = 3 * screening.ROUNDS
  rows = placements(3, 2 * count)
  turn = choose(
    rows, jnp.zeros(len(rows), jnp.int32), jnp.array([count]), count
  )
  assert np.isfinite(turn).sum() == count
  assert turn[np.isfinite(turn)].max() < screening.ROUNDS


@pytest.mark.parametrize('scale', [1e-4, 1, 1e4])
def test_losses_of_any_scale_are_finite(scale):
  """Rows that hardly differ make the Gram matrix nearly singular."""
  known = PROBLEM.prior._replace(loss=scale * PROBLEM.prior.loss)
  other = PROBLEM.replace(prior=known)
  seen = evaluated(placements(0, surrogate.MEMORY), surrogate.MEMORY)
  found = expect(other, believe(other, seen), placements(1))
  drawn = draw_factors(jax.random.key(0), other, learn(other, seen), 4)
  for values in (found, drawn):
    assert jnp.isfinite(values).all()


# As a part of a search.


def test_without_a_prior_there_is_none():
  assert surrogate.make(PROBLEM.replace(prior=None)) is None


def test_it_picks_where_other_objectives_are_known_and_it_is_asked_to():
  assert surrogate.make(PROBLEM).select is not None
  assert surrogate.make(PROBLEM, screens=False).select is None
  unknown = PROBLEM.replace(known_objectives=None)
  assert surrogate.make(unknown).select is None


def test_it_learns_from_what_is_evaluated_and_picks_by_it():
  one = surrogate.make(PROBLEM)
  rows = placements(0)
  owner = jnp.zeros(ROWS, jnp.int32)
  done = Population(rows, score(PROBLEM.data, rows), owner)
  first, key = one.init(), jax.random.key(0)
  state, learned = jax.jit(one.update)(key, first, done)
  shapes = functools.partial(jax.tree.map, lambda x: (x.shape, x.dtype))
  assert shapes(state) == shapes(first)
  np.testing.assert_array_equal(state.seen.choices[-ROWS:], rows)
  assert int(learned.known.sum()) == ROWS
  new = placements(1)
  np.testing.assert_allclose(
    expect(PROBLEM, state.belief, new),
    expected(evaluated(rows, surrogate.MEMORY), new),
    rtol=1e-4,
    atol=1e-4,
  )
  proposer, places = jnp.repeat(jnp.arange(3), 30), jnp.array([2, 9, 4])
  args = evaluated(rows, 20), placements(5, 90), proposer, places, 15
  found = jax.jit(one.select, static_argnums=6)(key, state, *args)
  np.testing.assert_array_equal(found, rounds(key, state.belief, *args))
  assert np.isfinite(found).sum() == 15
