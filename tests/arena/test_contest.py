"""Methods side by side: evaluations are counted, and what is found is kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemo_jax.arena import baselines, contest, statistics
from nemo_jax.search import progress
from nemo_jax.search.species import direct
from tests import placement
from tests.additive import additive_problem

PROBLEM = additive_problem()
NODES, CHOICES = PROBLEM.allowed.shape


def test_the_ledger_counts_and_keeps_the_front():
  told = []
  ledger = contest.Ledger(PROBLEM, spent=7, progress=told.append)
  rows = np.random.default_rng(0).integers(0, CHOICES, (43, NODES))
  ledger.score(rows[:3])
  ledger.score(rows[3:])
  assert ledger.spent == 50
  assert sum(told) == 43
  counts, volumes = zip(*ledger.curve, strict=True)
  assert list(counts) == sorted(counts)
  assert list(volumes) == sorted(volumes)
  choices, values = ledger.front()
  np.testing.assert_array_equal(values, contest.objectives(PROBLEM, choices))
  volume = statistics.hypervolume(values, PROBLEM.ideal, PROBLEM.reference)
  assert volume == pytest.approx(volumes[-1], rel=1e-5)
  exact = progress.hypervolume(PROBLEM, contest.objectives(PROBLEM, rows))
  assert volume == pytest.approx(float(exact), rel=1e-5)


def test_nothing_is_scored_for_nothing():
  ledger = contest.Ledger(PROBLEM)
  assert ledger.score(np.zeros((0, NODES), int)).shape == (0, 3)
  assert ledger.curve == [(0, 0.0)]
  choices, values = ledger.front()
  assert choices.shape == (0, NODES)
  assert values.shape == (0, 3)


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_worth_nothing(bad):
  problem = placement.placement_problem(5)
  sick = problem.replace(
    evaluate=lambda data, row: jnp.where(
      (row[0] == 1) & (jnp.arange(3) == 2), bad, problem.evaluate(data, row)
    )
  )
  rows = np.array([[1, 1, 1, 1, 1], [2, 1, 1, 1, 1]])
  found = contest.objectives(sick, rows)
  np.testing.assert_array_equal(np.isposinf(found), [[True] * 3, [False] * 3])


def test_a_baseline_is_a_method():
  ledger = contest.Ledger(PROBLEM)
  method = contest.baseline(PROBLEM, baselines.find('random_search').search)
  method(jax.random.key(0), 30, ledger)
  assert ledger.spent == 30
  assert [count for count, _ in ledger.curve] == [0, 20, 30]


def test_a_team_searches_in_whole_generations_and_the_key_decides():
  problem = placement.placement_problem(5).replace(prior=None)
  method = contest.team(problem, [direct.BUILDER], 8, archive_size=64)

  def found(seed):
    told = []
    ledger = contest.Ledger(problem, 5, progress=told.append, capacity=64)
    method(jax.random.key(seed), 27, ledger)
    assert told == [8, 8, 8]
    assert [count for count, _ in ledger.curve] == [5, 13, 21, 29]
    return ledger

  first, again, other = found(0), found(0), found(1)
  assert first.curve == again.curve != other.curve
  volumes = [volume for _, volume in first.curve]
  assert volumes == sorted(volumes)
  choices, values = first.front()
  np.testing.assert_array_equal(values, contest.objectives(problem, choices))
