"""Hypervolume, R2 and reference directions against moocore and pymoo."""

import jax
import jax.numpy as jnp
import moocore
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pymoo.util.ref_dirs import get_reference_directions

from nemo_jax import pareto
from tests.pareto.sets import (
  broken_sets,
  by_example,
  later,
  nan_to_inf,
  random_masks,
)

batched_hypervolume = jax.jit(
  jax.vmap(pareto.hypervolume, in_axes=(0, None, 0))
)
batched_r2 = jax.jit(jax.vmap(pareto.r2, in_axes=(0, None, None, 0)))
volume = jax.jit(pareto.hypervolume)
r2 = jax.jit(pareto.r2)

# Hypervolume.


@pytest.mark.parametrize('m', [2, 3])
def test_hypervolume_is_that_of_moocore(m):
  # With the reference inside the cloud, many points lie beyond it, and those
  # of a grid lie on it.
  for reference in (np.full(m, 0.6), np.linspace(1.5, 1, m)):
    sets = broken_sets(m, 600, 40, m)
    masks = random_masks(m, 600, 40)
    reference = reference.astype(np.float32).astype(np.float64)
    single = batched_hypervolume(sets.astype(np.float32), reference, masks)
    with jax.enable_x64(True):
      double = batched_hypervolume(sets, reference, masks)
      assert double.dtype == np.float64
    theirs = np.array(
      [
        moocore.hypervolume(nan_to_inf(objectives[mask]), ref=reference)
        for objectives, mask in zip(sets, masks, strict=True)
      ]
    )
    assert theirs[0] == 0
    assert (theirs[1:] > 0).mean() > 0.8
    np.testing.assert_allclose(single, theirs, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(double, theirs, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize('m', [3, *later(2)])
def test_hypervolume_of_two_thousand_points_is_that_of_moocore(m):
  sets = broken_sets(m, 9, 2000, m)
  masks = random_masks(m, 9, 2000)
  reference = np.linspace(1, 0.5, m).astype(np.float32).astype(np.float64)
  ours = batched_hypervolume(sets.astype(np.float32), reference, masks)
  theirs = [
    moocore.hypervolume(nan_to_inf(objectives[mask]), ref=reference)
    for objectives, mask in zip(sets, masks, strict=True)
  ]
  np.testing.assert_allclose(ours, theirs, rtol=1e-5)


@pytest.mark.parametrize('m', [2, 3])
def test_hypervolume_of_integers_counts_the_dominated_cells(m):
  rng = np.random.default_rng(0)
  sets = rng.integers(0, 9, (300, 8, m))
  masks = random_masks(0, 300, 8)
  reference = np.array([7, 8, 6][:m])
  cells = np.stack(np.meshgrid(*map(np.arange, reference)), -1).reshape(-1, m)
  below = (sets[:, :, None] <= cells).all(-1) & masks[:, :, None]
  ours = batched_hypervolume(
    sets.astype(np.float32), reference.astype(np.float32), masks
  )
  np.testing.assert_array_equal(ours, below.any(1).sum(-1))


@pytest.mark.parametrize('m', [2, 3])
@pytest.mark.parametrize(
  'row', [[1, 0, 0], [0, 1, 0], [2, -9, -9], [np.inf, 0, 0], [0, np.nan, 0]]
)
def test_hypervolume_of_a_useless_point_is_zero(m, row):
  objectives = np.array([row[:m]], np.float32)
  assert volume(objectives, np.ones(m)) == 0


@pytest.mark.parametrize('m', [2, 3])
def test_hypervolume_of_nothing_is_zero(m):
  nothing = np.zeros(8, bool)
  assert volume(np.zeros((8, m), np.float32), np.ones(m), nothing) == 0


@pytest.mark.parametrize('m', [1, 4])
def test_hypervolume_refuses_what_it_cannot_do_exactly(m):
  with pytest.raises(ValueError, match='2 or 3 objectives'):
    pareto.hypervolume(jnp.zeros((5, m)), jnp.ones(m))


@pytest.mark.parametrize('m', [3, *later(2)])
def test_hypervolume_never_falls_when_a_point_is_added(m):
  reference = np.full(m, 10, np.float32)
  # Volumes of integer boxes are exact in float32.
  element = st.integers(-5, 12).map(float) | st.sampled_from([np.inf, np.nan])

  @given(hnp.arrays(np.float32, (8, m), elements=element), st.integers(0, 7))
  @by_example
  def check(objectives, added):
    without = np.arange(8) != added
    assert volume(objectives, reference, without) <= volume(
      objectives, reference, np.ones(8, bool)
    )

  check()


# R2 and reference directions.


@pytest.mark.parametrize('m', [2, 3])
def test_r2_is_the_mean_of_the_least_chebyshev_distances(m):
  sets = broken_sets(m, 500, 30, m)
  masks = random_masks(m, 500, 30)
  weights = pareto.reference_directions(m, 7)
  ideal = np.linspace(-0.25, 0.25, m)
  expected = []
  for objectives, mask in zip(sets, masks, strict=True):
    rows = objectives[mask & np.isfinite(objectives).all(-1)]
    weighted = weights[:, None] * np.abs(rows - ideal)
    expected.append(weighted.max(-1).min(-1, initial=np.inf).mean())
  assert expected[0] == np.inf
  assert np.isfinite(expected).mean() > 0.9
  ours = batched_r2(sets.astype(np.float32), weights, ideal, masks)
  np.testing.assert_allclose(ours, expected, rtol=1e-5)


def test_r2_of_several_sets_of_the_same_rows_is_that_of_each():
  objectives = broken_sets(0, 4, 30, 3)[2].astype(np.float32)
  masks = random_masks(0, 12, 30).reshape(3, 4, 30)
  weights, ideal = pareto.reference_directions(3, 7), np.zeros(3)
  ours = r2(objectives, weights, ideal, masks)
  assert ours.shape == (3, 4)
  for index in np.ndindex(3, 4):
    alone = r2(objectives, weights, ideal, masks[index])
    np.testing.assert_allclose(ours[index], alone, rtol=1e-6)


def test_r2_of_nothing_is_infinite():
  weights = pareto.reference_directions(2, 3)
  nothing = np.zeros(4, bool)
  assert r2(np.zeros((4, 2)), weights, np.zeros(2), nothing) == np.inf


def test_r2_takes_no_notice_of_a_row_that_was_not_evaluated():
  weights = pareto.reference_directions(2, 1)
  objectives = np.array([[0.0, np.inf], [np.nan, 0.0], [2.0, 4.0]])
  assert r2(objectives, weights, np.zeros(2)) == 3


@pytest.mark.parametrize(
  ('m', 'partitions'),
  [(2, 1), (2, 99), (3, 1), (3, 4), (3, 12), (4, 6), (5, 4), (8, 2)],
)
def test_reference_directions_are_those_of_pymoo(m, partitions):
  ours = pareto.reference_directions(m, partitions)
  theirs = get_reference_directions('das-dennis', m, n_partitions=partitions)

  def multiples(directions):
    return sorted(map(tuple, np.rint(directions * partitions).astype(int)))

  assert ours.dtype == np.float32
  np.testing.assert_allclose(ours.sum(-1), 1, rtol=1e-6)
  np.testing.assert_allclose(
    ours * partitions, np.rint(ours * partitions), atol=1e-5
  )
  assert multiples(ours) == multiples(theirs)
