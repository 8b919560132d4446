"""NSGA-III against pymoo.

Its choices hang on comparisons of rounded numbers, so that only float64 can be
held to the choices of pymoo.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pymoo.algorithms.moo.nsga3 import (
  HyperplaneNormalization,
  ReferenceDirectionSurvival,
  associate_to_niches,
)
from pymoo.core.population import Population as PymooPopulation
from pymoo.core.problem import Problem as PymooProblem
from pymoo.util.ref_dirs import get_reference_directions

from nemo_jax import pareto
from tests.pareto.sets import (
  SMOOTH,
  batched_rank,
  broken_sets,
  finite_sets,
  later,
  pymoo_rank,
  random_masks,
)

batched_normalize = jax.jit(jax.vmap(pareto.hyperplane_normalize))
batched_associate = jax.jit(jax.vmap(pareto.associate, in_axes=(0, None)))
batched_order = jax.jit(jax.vmap(pareto.nsga3_order, in_axes=(0, 0, None, 0)))
batched_niching = jax.jit(
  jax.vmap(pareto.niching_order, in_axes=(0, None, None, None))
)
associate = jax.jit(pareto.associate)


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
