"""A generation in three programs is a generation in one."""

import jax
import numpy as np
import pytest

from nemo_jax.search import nemo
from tests.placement import placement_problem
from tests.search import diaries
from tests.search.compiling import quickly
from tests.search.diaries import SIZE

# Some of its evaluations fail.
PROBLEM = diaries.moody(placement_problem(), diaries.SICK)
KEY = jax.random.key(3)


@pytest.fixture(scope='module')
def search():
  """With a surrogate that picks, as most searches are."""
  team = diaries.diarists(2)
  return nemo.make(
    PROBLEM, team, SIZE, archive_size=64, partitions=4, batch_size=4
  )


@pytest.fixture(scope='module')
def compiled(search):
  return search.compile(KEY, search.init(KEY))


def test_a_compiled_step_is_a_step_and_uses_up_its_state(search, compiled):
  step = quickly(search.step)
  state, other = search.init(KEY), search.init(KEY)
  for _ in range(3):
    before = state
    state, metrics = compiled.step(state)
    assert before.population.choices.is_deleted()
    other, expected = step(KEY, other)
    diaries.assert_same(state, other)
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
      np.testing.assert_allclose(metrics[name], value, rtol=1e-4)
  assert state.failures == other.failures > 0


def test_the_program_that_evaluates_can_be_looked_at(search, compiled):
  choices = search.init(KEY).population.choices
  objectives = compiled.evaluation(PROBLEM, choices)
  np.testing.assert_allclose(
    objectives, diaries.objectives_of(PROBLEM, choices), rtol=1e-6
  )
  memory = compiled.evaluation.memory_analysis()
  assert memory.output_size_in_bytes > 0
