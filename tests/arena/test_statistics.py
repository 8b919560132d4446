"""Hypervolumes of fronts, intervals of seeds, and what half of them attain."""

import numpy as np
import pytest
import scipy.stats

from nemo_jax.arena import statistics


def test_the_volume_is_between_the_ideal_and_the_reference():
  ideal, reference = np.zeros(2), np.array([2.0, 4.0])
  volume = lambda *rows: statistics.hypervolume(
    np.asarray(rows, np.float32).reshape(-1, 2), ideal, reference
  )
  assert volume() == 0
  assert volume([0, 0]) == 1
  assert volume([1, 2]) == pytest.approx(0.25)
  assert volume([1, 2], [1, 2], [2, 4], [3, 0]) == pytest.approx(0.25)
  assert volume([1, 2], [0.5, 3]) == pytest.approx(0.25 + 0.25 / 4)


def test_intervals_are_those_of_students_t():
  values = np.random.default_rng(0).normal(size=(7, 3))
  for column, half in zip(values.T, statistics.interval(values), strict=True):
    low, high = scipy.stats.t.interval(
      0.95, 6, column.mean(), column.std(ddof=1) / np.sqrt(7)
    )
    assert half == pytest.approx((high - low) / 2)
  np.testing.assert_array_equal(statistics.interval(values[:1]), np.zeros(3))


def test_attainment_is_the_median_of_the_runs():
  fronts = [
    np.array([[0.5, 1.0], [0.1, 3.0]]),
    np.array([[0.4, 2.0]]),
    np.array([[0.3, 1.0], [0.2, 2.0]]),
  ]
  grid = np.array([0.5, 1.0, 2.0, 3.0])
  found = statistics.attainment(fronts, grid, 1)
  np.testing.assert_array_equal(found, [np.inf, 0.5, 0.4, 0.2])


def cell(value):
  return {'volumes': {'100': {'search': value}}}


def test_the_summary_pairs_the_seeds():
  results = {
    'a': {'0': cell(0.5), '1': cell(0.7)},
    'b': {'0': cell(0.4), '1': cell(0.65)},
  }
  one, two = statistics.summarise(results, ['a', 'b'], ['0', '1'])
  assert one['gain'] == 0
  assert one['p_value'] is None
  assert two['mean'] == pytest.approx(0.525)
  assert two['gain'] == pytest.approx(0.075)
  assert two['ahead'] == 2
  # Student's t with one degree of freedom at 97.5 %.
  assert two['gain_interval'] == pytest.approx(12.706 * 0.025, rel=1e-3)
  assert 0 < two['p_value'] < 0.25


def test_one_seed_has_no_interval_and_no_test():
  results = {'a': {'3': cell(0.5)}, 'b': {'3': cell(0.4)}}
  _, two = statistics.summarise(results, ['a', 'b'], ['3'])
  assert two['interval'] == two['gain_interval'] == 0
  assert two['p_value'] is None
  assert two['gain'] == pytest.approx(0.1)
