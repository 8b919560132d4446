"""Pareto primitives against pymoo, moocore and brute force."""

import functools
import subprocess
import sys

import jax
import jax.extend
import jax.numpy as jnp
import moocore
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pymoo.algorithms.moo.nsga3 import (
  HyperplaneNormalization,
  ReferenceDirectionSurvival,
  associate_to_niches,
)
from pymoo.core.population import Population as PymooPopulation
from pymoo.core.problem import Problem as PymooProblem
from pymoo.operators.survival.rank_and_crowding.metrics import (
  get_crowding_function,
)
from pymoo.util.dominator import Dominator
from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting
from pymoo.util.ref_dirs import get_reference_directions

from nemo_jax import pareto
from nemo_jax.search.problem import Population

batched_rank = jax.jit(
  jax.vmap(pareto.nondominated_rank, in_axes=(0, 0, None)), static_argnums=2
)
batched_crowding = jax.jit(jax.vmap(pareto.crowding_distance))
batched_hypervolume = jax.jit(
  jax.vmap(pareto.hypervolume, in_axes=(0, None, 0))
)
batched_r2 = jax.jit(jax.vmap(pareto.r2, in_axes=(0, None, None, 0)))
batched_normalize = jax.jit(jax.vmap(pareto.hyperplane_normalize))
batched_associate = jax.jit(jax.vmap(pareto.associate, in_axes=(0, None)))
batched_order = jax.jit(jax.vmap(pareto.nsga3_order, in_axes=(0, 0, None, 0)))
batched_duplicated = jax.jit(jax.vmap(pareto.duplicated))
batched_insert = jax.jit(jax.vmap(pareto.archive_insert))
batched_niching = jax.jit(
  jax.vmap(pareto.niching_order, in_axes=(0, None, None, None))
)
rank = jax.jit(pareto.nondominated_rank, static_argnames='block')
crowding = jax.jit(pareto.crowding_distance)
volume = jax.jit(pareto.hypervolume)
r2 = jax.jit(pareto.r2)
associate = jax.jit(pareto.associate)
duplicated = jax.jit(pareto.duplicated)
dominates = jax.jit(pareto.dominates)

SMOOTH, FRONT, GRID = range(3)

by_example = settings(max_examples=25, deadline=None, derandomize=True)


def later(*values):
  """Parameters of tests that are slow."""
  row = lambda v: v if isinstance(v, tuple) else (v,)
  return [pytest.param(*row(v), marks=pytest.mark.slow) for v in values]


def finite_sets(seed, batch, n, m):
  """float64[batch, n, m]: a third each of clouds, thin fronts, and grids.

  The values are those of float32, so that no cast makes or breaks a tie. A
  tenth of the rows repeat another row.
  """
  rng = np.random.default_rng(seed)
  sets = rng.uniform(size=(batch, n, m))
  kind = np.arange(batch) % 3
  sets[kind == FRONT] /= sets[kind == FRONT].sum(-1, keepdims=True)
  sets[kind == GRID] = rng.integers(0, 6, sets[kind == GRID].shape) / 5
  source = np.where(
    rng.random((batch, n)) < 0.1, rng.integers(0, n, (batch, n)), np.arange(n)
  )
  sets = np.take_along_axis(sets, source[..., None], axis=1)
  return sets.astype(np.float32).astype(np.float64)


def random_masks(seed, batch, n):
  """bool[batch, n]: nearly full ones, nearly empty ones, one quite empty."""
  rng = np.random.default_rng(seed)
  masks = rng.random((batch, n)) < rng.choice([0.1, 0.5, 0.95, 1], (batch, 1))
  masks[0] = False
  return masks


def broken_sets(seed, batch, n, m):
  """Like `finite_sets`, but half of the sets hold infinities and NaNs."""
  sets = finite_sets(seed, batch, n, m)
  rng = np.random.default_rng(seed + 1)
  hurt = (rng.random(batch) < 0.5)[:, None, None]
  sets[hurt & (rng.random(sets.shape) < 0.1)] = np.inf
  sets[hurt & (rng.random(sets.shape) < 0.05)] = np.nan
  return sets


def nan_to_inf(objectives):
  return np.where(np.isnan(objectives), np.inf, objectives)


def pymoo_rank(objectives):
  # Without a dominator of its own, pymoo asks moocore.
  sorting = NonDominatedSorting(dominator=Dominator())
  return sorting.do(objectives, return_rank=True)[1]


def moocore_rank(objectives):
  # moocore 0.3.2 misplaces infinities among three objectives or more: it ranks
  # [0, inf, 0] and [inf, 0, 0] apart. A larger number than all ranks alike.
  return moocore.pareto_rank(np.where(np.isinf(objectives), 1e9, objectives))


# Ranks.


@pytest.mark.parametrize(
  ('batch', 'n', 'm', 'block'),
  [
    (500, 48, 2, 256),
    (500, 48, 3, 7),
    (1000, 7, 3, 3),
    (30, 300, 3, 256),
    (12, 700, 3, 128),
    *later(
      (500, 48, 3, 256),
      (500, 48, 3, 48),
      (500, 48, 3, 16),
      (500, 48, 4, 32),
      (30, 300, 2, 64),
      (12, 700, 2, 600),
    ),
  ],
)
def test_rank_is_the_front_of_pymoo_and_moocore(batch, n, m, block):
  sets = broken_sets(n + m + block, batch, n, m)
  masks = random_masks(block, batch, n)
  ours = np.asarray(batched_rank(sets.astype(np.float32), masks, block))
  for objectives, mask, ranks in zip(sets, masks, ours, strict=True):
    assert (ranks[~mask] == n).all()
    if mask.any():
      valid = nan_to_inf(objectives[mask])
      np.testing.assert_array_equal(ranks[mask], pymoo_rank(valid))
      np.testing.assert_array_equal(ranks[mask], moocore_rank(valid))


@pytest.mark.parametrize('kind', [SMOOTH, *later(FRONT, GRID)])
def test_rank_of_two_thousand_points(kind):
  objectives = finite_sets(0, 3, 2000, 3)[kind]
  ours = rank(objectives.astype(np.float32))
  np.testing.assert_array_equal(ours, moocore_rank(objectives))
  np.testing.assert_array_equal(ours, pymoo_rank(objectives))


@pytest.mark.parametrize('block', [64, *later(1, 300, 999)])
def test_rank_of_a_chain_counts_its_links(block):
  position = np.random.default_rng(0).permutation(300)
  chain = np.stack([position, position, position], -1).astype(np.float32)
  ours = rank(chain, block=block)
  np.testing.assert_array_equal(ours, position)


def test_of_no_points_there_are_no_ranks_and_no_volume():
  nothing = jnp.zeros((0, 3))
  assert pareto.nondominated_rank(nothing).shape == (0,)
  assert pareto.hypervolume(nothing, jnp.ones(3)) == 0


def test_rank_of_a_chain_longer_than_the_keys_of_short_sets():
  for n in (2**15 - 1, 2**15):
    position = np.random.default_rng(n).permutation(n)
    chain = np.stack([position, position], -1).astype(np.float32)
    np.testing.assert_array_equal(rank(chain), position)


def test_rank_does_not_tell_minus_zero_from_zero():
  objectives = jnp.array([[0.0, 1.0], [-0.0, 1.0], [0.0, -0.0], [-0.0, 0.0]])
  np.testing.assert_array_equal(rank(objectives), [1, 1, 0, 0])


def test_rank_without_a_mask_is_the_rank_of_valid_rows():
  objectives = broken_sets(0, 1, 64, 3)[0].astype(np.float32)
  everything = np.ones(64, bool)
  np.testing.assert_array_equal(rank(objectives), rank(objectives, everything))


small_sets = hnp.arrays(
  np.float32,
  (12, 3),
  elements=st.one_of(
    st.integers(0, 3).map(float),
    st.floats(width=32, allow_subnormal=False, allow_nan=False),
    st.sampled_from([np.nan, np.inf]),
  ),
)


@given(small_sets)
@by_example
def test_rank_is_zero_exactly_where_nothing_dominates(objectives):
  known = nan_to_inf(objectives)
  dominated = [
    any((b <= a).all() and (b < a).any() for b in known) for a in known
  ]
  np.testing.assert_array_equal(rank(objectives) > 0, dominated)


@given(small_sets, st.permutations(range(12)))
@by_example
def test_rank_follows_its_row(objectives, permutation):
  permutation = np.array(permutation)
  np.testing.assert_array_equal(
    rank(objectives[permutation]), rank(objectives)[permutation]
  )


@given(small_sets, small_sets)
@by_example
def test_dominates_is_no_worse_and_somewhere_better(a, b):
  ours = dominates(a, b)
  pairs = zip(a.tolist(), b.tolist(), strict=True)
  expected = [
    all(x <= y for x, y in zip(p, q, strict=True))
    and any(x < y for x, y in zip(p, q, strict=True))
    for p, q in pairs
  ]
  np.testing.assert_array_equal(ours, expected)


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


# Crowding.


def pymoo_crowding(objectives):
  # pymoo takes the mean over objectives where the paper takes the sum.
  return get_crowding_function('cd').do(objectives) * objectives.shape[1]


@pytest.mark.filterwarnings('ignore:invalid value')
@pytest.mark.parametrize(('n', 'm'), [(48, 3), *later((48, 2), (7, 4))])
def test_crowding_is_that_of_pymoo_on_every_front(n, m):
  batch = 250
  sets = broken_sets(n + m, batch, n, m)
  masks = random_masks(n, batch, n)
  ranks = batched_rank(sets.astype(np.float32), masks, 256)
  single = np.asarray(batched_crowding(sets.astype(np.float32), ranks, masks))
  with jax.enable_x64(True):
    double = np.asarray(batched_crowding(sets, ranks, masks))
  ranks = np.asarray(ranks)
  for i in range(batch):
    assert (single[i][~masks[i]] == -np.inf).all()
    for front in np.unique(ranks[i][masks[i]]):
      members = ranks[i] == front
      theirs = pymoo_crowding(nan_to_inf(sets[i][members]))
      np.testing.assert_allclose(double[i][members], theirs, rtol=1e-12)
      np.testing.assert_allclose(
        single[i][members], theirs, rtol=1e-5, atol=1e-5
      )


def test_crowding_without_ranks_takes_all_rows_for_one_front():
  sets = finite_sets(5, 60, 30, 3)
  masks = random_masks(5, 60, 30)
  one_front = jax.vmap(lambda x, y: pareto.crowding_distance(x, mask=y))
  ours = np.asarray(jax.jit(one_front)(sets.astype(np.float32), masks))
  for objectives, mask, distance in zip(sets, masks, ours, strict=True):
    theirs = pymoo_crowding(objectives[mask])
    np.testing.assert_allclose(distance[mask], theirs, rtol=1e-5, atol=1e-5)
    assert (distance[~mask] == -np.inf).all()


def test_crowding_sums_the_gaps_of_a_worked_example():
  front = jnp.array([[0.0, 8.0], [1.0, 4.0], [3.0, 2.0], [4.0, 0.0]])
  expected = [np.inf, 3 / 4 + 6 / 8, 3 / 4 + 4 / 8, np.inf]
  np.testing.assert_array_equal(crowding(front), expected)


@given(
  st.lists(st.permutations(range(10)), min_size=3, max_size=3),
  hnp.arrays(np.int32, 10, elements=st.integers(0, 2)),
  st.permutations(range(10)),
)
@by_example
def test_crowding_follows_its_row_where_nothing_ties(columns, ranks, order):
  objectives = np.array(columns, np.float32).T
  order = np.array(order)
  np.testing.assert_array_equal(
    crowding(objectives[order], ranks[order]),
    crowding(objectives, ranks)[order],
  )


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


# NSGA-III. Its choices hang on comparisons of rounded numbers, so that only
# float64 can be held to the choices of pymoo.


def usable_rows(objectives, mask):
  return mask & np.isfinite(objectives).all(-1)


def scaled_sets(seed, batch, n, m):
  """Like `broken_sets`, but every objective has a range of its own.

  Every other set has a point out on every axis, because the extreme points
  of sets without such seldom span a plane.
  """
  sets = broken_sets(seed, batch, n, m)
  rng = np.random.default_rng(seed + 2)
  out = np.eye(m) * rng.uniform(0.5, 1.5, (batch, m, m))
  sets[::2] += 0.1
  sets[::2, :m] = (out + rng.uniform(0, 0.02, (batch, m, m)))[::2]
  scale = np.array([1.0, 3.0, 0.5, 2.0])[:m]
  offset = np.array([0.0, -30.0, 2.0, 0.5])[:m]
  return sets * scale + offset


@functools.cache
def normalized_sets(m):
  """List of (rows, their front, what pymoo knows, and our normalization)."""
  sets = scaled_sets(m, 500, 48, m)
  masks = random_masks(m, 500, 48)
  usable = usable_rows(sets, masks)
  with jax.enable_x64(True):
    ranks = np.asarray(batched_rank(sets, usable, 256))
    ours = np.asarray(batched_normalize(sets, ranks, masks))
  assert (ours[~usable] == np.inf).all()
  cases = []
  for i in np.flatnonzero(usable.any(-1)):
    rows, front = sets[i][usable[i]], ranks[i][usable[i]] == 0
    peer = HyperplaneNormalization(m)
    peer.update(rows, nds=np.flatnonzero(front))
    cases.append((rows, front, peer, ours[i][usable[i]]))
  return cases


def flatness(peer):
  """Zero where the extreme points of pymoo span no plane, large if steep."""
  span = peer.worst_point - peer.ideal_point
  extremes = peer.extreme_points - peer.ideal_point
  extremes /= np.where(span > 0, span, 1)
  return np.linalg.svd(extremes, compute_uv=False).min()


def between(rows, ideal, nadir):
  span = nadir - ideal
  return (rows - ideal) / np.where(span == 0, 1e-12, span)


@pytest.mark.parametrize('m', [3, *later(2, 4)])
def test_normalization_is_that_of_pymoo_where_there_is_a_plane(m):
  compared = 0
  for rows, _, peer, ours in normalized_sets(m):
    if flatness(peer) > 1e-2:
      theirs = between(rows, peer.ideal_point, peer.nadir_point)
      np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)
      compared += 1
  assert compared > 50


@pytest.mark.parametrize('m', [3, *later(2, 4)])
def test_normalization_takes_the_worst_of_the_front_where_there_is_no_plane(m):
  # pymoo is no peer here: it goes by the plane that rounding makes up, if
  # the solver does not happen to hit a pivot of exactly zero.
  compared = 0
  for rows, front, peer, ours in normalized_sets(m):
    if flatness(peer) < 1e-9:
      ideal, nadir = rows.min(0), rows[front].max(0)
      nadir = np.where(nadir - ideal <= 1e-6, rows.max(0), nadir)
      expected = between(rows, ideal, nadir)
      np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-9)
      compared += 1
  assert compared > 50


def test_normalization_takes_less_than_a_thousandth_for_nothing():
  # The second point counts as lying on the second axis, where it is better
  # than the first. The plane through it and the third point is what counts.
  front = np.array([[0.0, 5.0], [0.0005, 2.0], [3.0, 0.0]])
  nadir = np.array([3.0, 2 * 3 / (3 - 0.0005)])
  ours = pareto.hyperplane_normalize(
    jnp.asarray(front, jnp.float32), jnp.zeros(3, jnp.int32)
  )
  np.testing.assert_allclose(ours, front / nadir, rtol=1e-6)


def test_normalization_in_float32_is_that_in_float64():
  sets = finite_sets(0, 500, 48, 3) * np.array([1.0, 100.0, 0.1])
  single = sets.astype(np.float32)
  ranks = batched_rank(single, np.ones(single.shape[:2], bool), 256)
  ours = batched_normalize(single, ranks)
  with jax.enable_x64(True):
    expected = batched_normalize(single.astype(np.float64), ranks)
  close = np.isclose(ours, expected, rtol=1e-3, atol=1e-3).all((1, 2))
  # A plane may fit by a hair in one and not in the other.
  assert close.mean() > 0.99


@pytest.mark.parametrize(('m', 'partitions'), [(3, 6), *later((2, 9), (4, 4))])
def test_niches_are_those_of_pymoo(m, partitions):
  rows = finite_sets(m, 200, 40, m) * 1.5
  rows[np.random.default_rng(m).random(rows.shape[:2]) < 0.1] = np.inf
  directions = get_reference_directions(
    'das-dennis', m, n_partitions=partitions
  )
  with jax.enable_x64(True):
    ours = batched_associate(rows, directions)
    niche, distance = map(np.asarray, ours)
  finite = np.isfinite(rows).all(-1)
  assert (niche[~finite] == 0).all()
  assert (distance[~finite] == np.inf).all()
  their_niche, their_distance, every_distance = associate_to_niches(
    rows[finite], directions, np.zeros(m), np.ones(m)
  )
  np.testing.assert_allclose(distance[finite], their_distance, atol=1e-9)
  least, second = np.sort(every_distance, axis=-1)[:, :2].T
  clear = second - least > 1e-9
  assert clear.mean() > 0.5
  np.testing.assert_array_equal(
    niche[finite][clear], their_niche[clear], strict=False
  )


def test_niches_take_no_notice_of_the_length_of_a_direction():
  rows = finite_sets(0, 3, 30, 3)[SMOOTH].astype(np.float32)
  directions = pareto.reference_directions(3, 3)
  lengths = np.linspace(0.5, 2, len(directions), dtype=np.float32)
  ours = associate(rows, directions * lengths[:, None])
  expected = associate(rows, directions)
  np.testing.assert_array_equal(ours[0], expected[0])
  np.testing.assert_allclose(ours[1], expected[1], atol=1e-6)


class Selection:
  """A batch of random sets, and the order in which we keep their rows.

  The niches and distances are those of our `associate`, which has tests of
  its own. Sets are clouds alone: elsewhere rows tie between two niches.
  """

  def __init__(self, partitions):
    self.directions = get_reference_directions(
      'das-dennis', 3, n_partitions=partitions
    )
    self.objectives = scaled_sets(partitions, 1500, 48, 3)[SMOOTH::3]
    masks = random_masks(partitions, 500, 48)
    self.usable = usable_rows(self.objectives, masks)
    keys = jax.random.split(jax.random.key(0), 500)
    with jax.enable_x64(True):
      self.order = np.asarray(
        batched_order(keys, self.objectives, self.directions, masks)
      )
      ranks = batched_rank(self.objectives, self.usable, 256)
      rows = batched_normalize(self.objectives, ranks, masks)
      associated = batched_associate(rows, self.directions)
    self.niche, self.distance = map(np.asarray, associated)
    self.ranks = np.asarray(ranks)

  def splits(self):
    """Every set that has rows, with a few sizes k to select."""
    rng = np.random.default_rng(0)
    for i, usable in enumerate(self.usable):
      if usable.any():
        for k in rng.integers(1, usable.sum() + 1, 3):
          yield i, k


@pytest.fixture(scope='module')
def selection():
  return Selection(partitions=5)


def test_selection_orders_every_row_once(selection):
  for order in selection.order:
    np.testing.assert_array_equal(np.sort(order), np.arange(48))


def test_selection_puts_rows_that_were_not_evaluated_last(selection):
  ordered = np.take_along_axis(selection.usable, selection.order, 1)
  assert (np.diff(ordered.astype(int)) <= 0).all()


def test_selection_takes_whole_fronts_before_it_splits_one(selection):
  for i, k in selection.splits():
    objectives = selection.objectives[i][selection.usable[i]]
    taken = selection.ranks[i][selection.order[i][:k]]
    np.testing.assert_array_equal(taken, np.sort(pymoo_rank(objectives))[:k])


def test_selection_fills_niches_as_evenly_as_pymoo(selection):
  problem, compared = PymooProblem(n_var=1, n_obj=3), 0
  for i, k in selection.splits():
    objectives = selection.objectives[i][selection.usable[i]]
    survival = ReferenceDirectionSurvival(selection.directions)
    theirs = survival.do(
      problem,
      PymooPopulation.new(F=objectives),
      n_survive=k,
      random_state=np.random.default_rng(k),
    )
    if flatness(survival.norm) < 1e-2:
      continue
    compared += 1
    ours = selection.niche[i][selection.order[i][:k]]
    length = len(selection.directions)
    np.testing.assert_array_equal(
      np.sort(np.bincount(ours, minlength=length)),
      np.sort(np.bincount(theirs.get('niche'), minlength=length)),
    )
  assert compared > 300


def test_selection_opens_a_niche_with_its_closest_member(selection):
  opened = 0
  for i, k in selection.splits():
    ranks, niche = selection.ranks[i], selection.niche[i]
    taken = selection.order[i][:k]
    split = ranks[taken].max()
    for j in np.setdiff1d(niche[taken], niche[ranks < split]):
      members = (niche == j) & (ranks == split)
      closest = selection.distance[i][members].min()
      assert closest in selection.distance[i][taken[niche[taken] == j]]
      opened += members.sum() > 1
  assert opened > 100


def niching_shares(ranks, niche, distance, place):
  """How often each row takes `place` in the order, over many keys."""
  keys = jax.random.split(jax.random.key(1), 4000)
  order = batched_niching(
    keys, np.array(ranks), np.array(niche), np.array(distance, np.float32)
  )
  return np.bincount(order[:, place], minlength=len(ranks)) / len(keys)


def test_niching_fills_up_an_open_niche_at_random():
  share = niching_shares(
    ranks=[0, 1, 1, 1, 1, 2],
    niche=[3, 3, 3, 3, 3, 3],
    distance=[9, 0, 1, 2, 3, 0],
    place=1,
  )
  np.testing.assert_allclose(
    share, [0, 1 / 4, 1 / 4, 1 / 4, 1 / 4, 0], atol=0.03
  )


def test_niching_visits_niches_of_one_count_at_random():
  share = niching_shares(
    ranks=[0, 0, 0, 0, 0, 0],
    niche=[0, 0, 1, 1, 2, 2],
    distance=[0, 1, 0, 1, 0, 1],
    place=0,
  )
  np.testing.assert_allclose(share, [1 / 3, 0, 1 / 3, 0, 1 / 3, 0], atol=0.03)


def test_niching_breaks_ties_of_distance_at_random():
  share = niching_shares(
    ranks=[0, 0, 0, 0, 0, 0],
    niche=[0, 0, 0, 0, 0, 0],
    distance=[1, 1, 2, 2, 3, 3],
    place=0,
  )
  np.testing.assert_allclose(share, [1 / 2, 1 / 2, 0, 0, 0, 0], atol=0.03)


def test_niching_serves_a_niche_that_earlier_fronts_left_empty_first():
  share = niching_shares(
    ranks=[0, 0, 1, 1, 1, 1],
    niche=[0, 1, 0, 1, 2, 2],
    distance=[0, 0, 0, 0, 5, 4],
    place=2,
  )
  np.testing.assert_array_equal(share, [0, 0, 0, 0, 0, 1])


# Duplicates.


def repeats(rows, mask):
  """bool[n], by brute force: an equal valid row came before."""
  seen, found = set(), []
  for row, valid in zip(rows.tolist(), mask, strict=True):
    found.append(bool(valid) and tuple(row) in seen)
    if valid:
      seen.add(tuple(row))
  return found


def small_integers(rng, shape):
  return rng.integers(-2, 3, shape).astype(np.int32)


def large_integers(rng, shape):
  return rng.choice([-(2**31), -(2**30), 0, 2**30, 2**31 - 1], shape).astype(
    np.int32
  )


def signed_zeros(rng, shape):
  return rng.choice([-1, -0.0, 0.0, 1, np.inf], shape).astype(np.float32)


def whole_floats(rng, shape):
  return rng.integers(0, 8, shape).astype(np.float32)


def uniform_floats(rng, shape):
  return rng.choice(rng.random(9), shape).astype(np.float32)


def bytes_of_choices(rng, shape):
  return rng.integers(0, 5, shape).astype(np.uint8)


def shorts(rng, shape):
  return rng.choice([-300, -1, 0, 1, 255, 256], shape).astype(np.int16)


def halves(rng, shape):
  return rng.choice([-1, -0.0, 0.0, 0.5, np.inf], shape).astype(np.float16)


def truths(rng, shape):
  return rng.random(shape) < 0.5


@pytest.mark.parametrize(
  'draw',
  [
    small_integers,
    large_integers,
    signed_zeros,
    whole_floats,
    uniform_floats,
    bytes_of_choices,
    shorts,
    halves,
    truths,
  ],
)
@pytest.mark.parametrize(('batch', 'n', 'k'), [(600, 40, 2), (100, 400, 3)])
def test_duplicated_finds_every_repeated_row_and_no_other(draw, batch, n, k):
  rows = draw(np.random.default_rng(n), (batch, n, k))
  masks = random_masks(k, batch, n)
  ours = batched_duplicated(rows, masks)
  expected = [repeats(*pair) for pair in zip(rows, masks, strict=True)]
  np.testing.assert_array_equal(ours, expected)


def test_duplicated_of_long_rows():
  rng = np.random.default_rng(0)
  rows = rng.integers(0, 6, (20, 100, 64)).astype(np.int32)
  rows[:, ::3] = rows[:, 1::3][:, rng.integers(0, 33, 34)]
  rows[:, 2::6, 0] += 1
  masks = np.ones((20, 100), bool)
  ours = batched_duplicated(rows, masks)
  expected = [repeats(*pair) for pair in zip(rows, masks, strict=True)]
  assert np.any(expected)
  np.testing.assert_array_equal(ours, expected)


def test_duplicated_tells_apart_what_float32_cannot():
  with jax.enable_x64(True):
    ours = duplicated(np.array([[1.0], [1.0 + 1e-12], [1.0]]))
  np.testing.assert_array_equal(ours, [False, False, True])


def test_duplicated_never_takes_a_nan_for_a_nan():
  rows = np.array([[np.nan, 1.0], [np.nan, 1.0]])
  assert not duplicated(rows).any()


@pytest.mark.parametrize('bound', [1, 7, 2**20, 2**31])
def test_order_is_a_stable_argsort(bound):
  key = np.random.default_rng(0).integers(0, bound, 5000).astype(np.int32)
  found = jax.jit(pareto.order, static_argnums=1)(key, bound)
  np.testing.assert_array_equal(found, np.argsort(key, kind='stable'))


# Archive.


def offered(seed, batch, steps, size, m, draw=whole_floats):
  """A stream of `steps` candidates, each row with a number of its own."""
  rng = np.random.default_rng(seed)
  objectives = draw(rng, (batch, steps, size, m))
  objectives[rng.random(objectives.shape) < 0.02] = np.inf
  objectives[rng.random(objectives.shape) < 0.02] = np.nan
  number = np.arange(steps * size, dtype=np.int32).reshape(steps, size, 1)
  number = np.broadcast_to(number, (batch, steps, size, 1))
  return Population(number, objectives, number[..., 0] % 5)


def at_step(stream, step):
  return jax.tree.map(lambda x: x[:, step], stream)


def archive_after(stream, capacity):
  """The archive after every step, from an empty one."""
  batch, steps, _, m = stream.objectives.shape
  empty = pareto.empty_population(capacity, 1, m)
  archive = jax.tree.map(lambda x: np.stack([x] * batch), empty)
  for step in range(steps):
    archive = batched_insert(archive, at_step(stream, step))
  return jax.tree.map(np.asarray, archive)


def numbers_in(archive, i):
  return archive.choices[i, np.isfinite(archive.objectives[i, :, 0]), 0]


@pytest.mark.parametrize('draw', [whole_floats, signed_zeros, uniform_floats])
@pytest.mark.parametrize('m', [2, 3])
def test_archive_is_the_front_of_all_that_was_ever_offered(draw, m):
  batch, steps, size = 300, 6, 8
  stream = offered(m, batch, steps, size, m, draw)
  archive = archive_after(stream, capacity=steps * size)
  for i in range(batch):
    rows = stream.objectives[i].reshape(-1, m).astype(np.float64)
    finite = np.flatnonzero(np.isfinite(rows).all(-1))
    # Of equal rows moocore keeps the first one, which is the oldest.
    front = finite[moocore.is_nondominated(rows[finite], keep_weakly=False)]
    kept = numbers_in(archive, i)
    np.testing.assert_array_equal(np.sort(kept), front)
    np.testing.assert_array_equal(
      archive.objectives[i, : len(kept)], rows[kept]
    )
    np.testing.assert_array_equal(archive.species[i, : len(kept)], kept % 5)


def test_archive_leaves_its_empty_slots_blank_and_last():
  archive = archive_after(offered(0, 300, 6, 8, 3), capacity=48)
  occupied = np.isfinite(archive.objectives).all(-1)
  assert (np.diff(occupied.astype(int)) <= 0).all()
  assert (archive.objectives[~occupied] == np.inf).all()
  assert (archive.species[~occupied] == -1).all()
  assert (archive.choices[~occupied] == 0).all()


@pytest.mark.parametrize('bad', [np.inf, -np.inf, np.nan])
def test_archive_never_takes_a_row_that_was_not_evaluated(bad):
  stream = offered(0, 300, 6, 8, 3)
  stream.objectives[..., 1] = bad
  archive = archive_after(stream, capacity=48)
  assert (archive.objectives == np.inf).all()
  assert (archive.species == -1).all()


def test_archive_does_not_change_when_the_same_is_offered_twice():
  stream = offered(1, 300, 6, 8, 3)
  once = archive_after(stream, capacity=48)
  for step in range(6):
    twice = batched_insert(once, at_step(stream, step))
    jax.tree.map(np.testing.assert_array_equal, twice, once)


def thick_fronts(rng, shape):
  rows = rng.random(shape)
  rows /= rows.sum(-1, keepdims=True)
  return (rows * rng.uniform(1, 1.1, shape[:-1])[..., None]).astype(np.float32)


def test_archive_that_overflows_again_and_again_stays_a_front():
  archive = archive_after(offered(2, 300, 4, 48, 3, thick_fronts), capacity=8)
  assert np.isfinite(archive.objectives).all()
  for objectives in archive.objectives.astype(np.float64):
    assert moocore.is_nondominated(objectives, keep_weakly=False).all()


# Transformations.


def to_population(objectives):
  number = jnp.arange(len(objectives), dtype=jnp.int32)
  return Population(number[:, None], objectives, number)


def insert_halves(objectives, mask):
  objectives = jnp.where(mask[:, None], objectives, jnp.inf)
  old, new = jnp.split(objectives, 2)
  return pareto.archive_insert(to_population(old), to_population(new))


FUNCTIONS = {
  'nondominated_rank': pareto.nondominated_rank,
  'duplicated': pareto.duplicated,
  'crowding_distance': lambda x, mask: pareto.crowding_distance(x, None, mask),
  'hypervolume': lambda x, mask: pareto.hypervolume(x, jnp.ones(3), mask),
  'r2': lambda x, mask: pareto.r2(
    x, pareto.reference_directions(3, 4), jnp.zeros(3), mask
  ),
  'hyperplane_normalize': lambda x, mask: pareto.hyperplane_normalize(
    x, (jnp.sum(x, axis=-1) > 1).astype(jnp.int32), mask
  ),
  'associate': lambda x, mask: pareto.associate(
    jnp.where(mask[:, None], x, jnp.inf), pareto.reference_directions(3, 4)
  ),
  'nsga3_order': lambda x, mask: pareto.nsga3_order(
    jax.random.key(0), x, pareto.reference_directions(3, 4), mask
  ),
  'archive_insert': insert_halves,
}


@pytest.mark.parametrize('name', FUNCTIONS)
def test_jit_and_vmap_change_nothing(name):
  function = FUNCTIONS[name]
  # Clouds alone: elsewhere rounding decides which of two niches is nearer.
  sets = jnp.asarray(broken_sets(4, 9, 32, 3)[SMOOTH::3], jnp.float32)
  masks = jnp.asarray(random_masks(3, 3, 32))
  fast = jax.jit(jax.vmap(function))(sets, masks)
  for i in range(3):
    eager = function(sets[i], masks[i])
    alone = jax.tree.map(lambda x, i=i: x[i], fast)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
      alone,
      eager,
    )


def test_import_works_in_a_fresh_interpreter():
  program = 'from nemo_jax import pareto; print(pareto.__name__)'
  done = subprocess.run(
    [sys.executable, '-c', program], capture_output=True, text=True, check=True
  )
  assert done.stdout.strip() == 'nemo_jax.pareto'


# Memory.


def largest_array(function, *args):
  """Elements of the largest intermediate, loops and inner jits included."""

  def largest(jaxpr):
    sizes = [v.aval.size for e in jaxpr.eqns for v in e.outvars]
    inner = map(largest, jax.extend.core.subjaxprs(jaxpr))
    return max([*sizes, *inner], default=0)

  return largest(jax.make_jaxpr(function)(*args).jaxpr)


def test_largest_array_is_found_inside_of_loops_and_jits():
  def outer(x):
    def body(carry, _):
      return carry + jax.jit(lambda y: (y[:, None] * y).sum())(x), None

    return jax.lax.scan(body, 0.0, length=2)[0]

  assert largest_array(outer, jnp.ones(50)) == 2500


MEMORY_POINTS = 4096


@pytest.mark.parametrize(
  'function',
  [
    pareto.nondominated_rank,
    pareto.duplicated,
    pareto.crowding_distance,
    lambda x: pareto.hypervolume(x, jnp.ones(3)),
    lambda x: pareto.r2(x, pareto.reference_directions(3, 12), jnp.zeros(3)),
    lambda x: pareto.nsga3_order(
      jax.random.key(0), x, pareto.reference_directions(3, 12)
    ),
    lambda x: pareto.archive_insert(to_population(x), to_population(x)),
  ],
  ids=[
    'nondominated_rank',
    'duplicated',
    'crowding_distance',
    'hypervolume',
    'r2',
    'nsga3_order',
    'archive_insert',
  ],
)
def test_memory_does_not_grow_with_the_square_of_the_points(function):
  objectives = jnp.zeros((MEMORY_POINTS, 3))
  assert largest_array(function, objectives) <= MEMORY_POINTS * 600
