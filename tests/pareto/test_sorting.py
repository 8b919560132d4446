"""Ranks, crowding and duplicates against pymoo, moocore and brute force."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pymoo.operators.survival.rank_and_crowding.metrics import (
  get_crowding_function,
)

from nemo_jax import pareto
from tests.pareto.sets import (
  FRONT,
  GRID,
  SMOOTH,
  batched_rank,
  broken_sets,
  by_example,
  finite_sets,
  later,
  moocore_rank,
  nan_to_inf,
  pymoo_rank,
  random_masks,
  signed_zeros,
  uniform_floats,
  whole_floats,
)

batched_crowding = jax.jit(jax.vmap(pareto.crowding_distance))
batched_duplicated = jax.jit(jax.vmap(pareto.duplicated))
rank = jax.jit(pareto.nondominated_rank, static_argnames='block')
crowding = jax.jit(pareto.crowding_distance)
duplicated = jax.jit(pareto.duplicated)
dominates = jax.jit(pareto.dominates)

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
