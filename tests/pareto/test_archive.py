"""What an archive keeps, also when it is full, against brute force."""

import hypothesis
import hypothesis.strategies as st
import jax
import moocore
import numpy as np
import pytest
from hypothesis.extra import numpy as hnp

from nemo_jax import pareto
from nemo_jax.core.types import InputError
from nemo_jax.pareto import contributions
from nemo_jax.search.problem import Population
from tests.pareto.sets import signed_zeros, uniform_floats, whole_floats

CAPACITY, OFFERED = 6, 10
insert = jax.jit(pareto.archive_insert)
batched_insert = jax.jit(jax.vmap(pareto.archive_insert))


# Of all that was offered.


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


# When it is full.


def population(objectives, first=0) -> Population:
  number = first + np.arange(len(objectives), dtype=np.int32)
  return Population(number[:, None], np.asarray(objectives, np.float32), number)


def kept(archive) -> np.ndarray:
  values = np.asarray(archive.objectives, np.float64)
  return values[np.isfinite(values).all(axis=1)]


def volume(rows, reference) -> float:
  rows = np.asarray(rows, np.float64).reshape(-1, len(reference))
  return moocore.hypervolume(rows, ref=reference) if len(rows) else 0.0


def front_of(rows) -> np.ndarray:
  return rows[moocore.is_nondominated(rows, keep_weakly=False)]


def costs(rows, reference) -> np.ndarray:
  whole = volume(rows, reference)
  return np.array(
    [
      whole - volume(np.delete(rows, i, axis=0), reference)
      for i in range(len(rows))
    ]
  )


def smooth(rng, shape):
  rows = rng.random(shape)
  rows /= rows.sum(-1, keepdims=True)
  return rows * rng.uniform(1, 1.3, (*shape[:-1], 1))


def grid(rng, shape):
  return rng.integers(0, 5, shape) / 4


@pytest.mark.parametrize('m', [2, 3])
def test_exclusive_volumes_are_what_is_lost_without_each_point(m):
  rng, ones = np.random.default_rng(m), np.ones(m)
  sets = np.concatenate([smooth(rng, (80, 9, m)), grid(rng, (80, 9, m))])
  sets = sets.astype(np.float32)
  # As the function asks for: at the reference in all objectives, or in none.
  sets[(sets >= 1).any(-1)] = 1
  ours = jax.jit(jax.vmap(contributions.exclusive_volumes, (0, None)))(
    sets, ones
  )
  theirs = [costs(rows.astype(np.float64), ones) for rows in sets]
  np.testing.assert_allclose(ours, theirs, atol=1e-6)
  assert np.mean(np.asarray(theirs) > 0) > 0.3


@pytest.mark.parametrize('m', [2, 3])
def test_the_least_contributors_go_one_after_the_other(m):
  rng, ones, overflowed = np.random.default_rng(m), np.ones(m), 0
  for _ in range(40):
    old = front_of(smooth(rng, (CAPACITY, m)).astype(np.float32))
    new = smooth(rng, (OFFERED, m)).astype(np.float32)
    archive = pareto.empty_population(CAPACITY, 1, m)
    archive = insert(archive, population(np.resize(old, (OFFERED, m))), ones)
    np.testing.assert_array_equal(
      np.unique(kept(archive), axis=0), np.unique(old, axis=0)
    )
    rows = front_of(np.concatenate([old, new]).astype(np.float64))
    overflowed += len(rows) > CAPACITY
    while len(rows) > CAPACITY:
      rows = np.delete(rows, np.argmin(costs(rows, ones)), axis=0)
    best = max(volume(rows, ones), volume(old, ones))
    found = kept(insert(archive, population(new, 100), ones))
    assert volume(found, ones) == pytest.approx(best, abs=1e-6)
  assert overflowed > 20


@pytest.mark.parametrize('m', [2, 3])
def test_the_hypervolume_of_a_full_archive_never_falls(m):
  reference = np.full(m, 0.9)

  @hypothesis.given(
    hnp.arrays(
      np.float32,
      (6, OFFERED, m),
      elements=st.one_of(
        st.integers(0, 8).map(lambda x: x / 8),
        st.floats(0, 1.25, width=32, allow_subnormal=False),
        st.sampled_from([np.inf, -np.inf, np.nan]),
      ),
    )
  )
  @hypothesis.settings(max_examples=30, deadline=None, derandomize=True)
  def check(stream):
    archive, last = pareto.empty_population(CAPACITY, 1, m), 0.0
    for rows in stream:
      archive = insert(archive, population(rows), reference)
      now = volume(kept(archive), reference)
      assert now >= last - 1e-6
      last = now

  check()


def test_in_few_slots_the_hypervolume_never_falls():
  rng, worse = np.random.default_rng(0), 0
  for _ in range(60):
    archive, last = pareto.empty_population(3, 1, 3), 0.0
    for _ in range(6):
      archive = insert(
        archive, population(smooth(rng, (OFFERED, 3))), np.ones(3)
      )
      now = volume(kept(archive), np.ones(3))
      worse += now < last - 1e-6
      last = now
  assert worse == 0


def test_beyond_the_reference_the_nearest_stay_and_inside_goes_first():
  rows = [[0, 9, 1], [0.5, 0.5, 0.5], [9, 0, 2], [0, 1.5, 0], [1.25, 0, 0]]
  archive = pareto.empty_population(3, 1, 3)
  found = insert(archive, population(rows), np.ones(3))
  assert sorted(found.choices[:, 0].tolist()) == [1, 3, 4]


def test_of_equals_the_newest_goes():
  archive = pareto.empty_population(2, 1, 2)
  rows = [[0, 8], [4, 4], [8, 0]]
  for order in ([0, 1, 2], [2, 1, 0]):
    full = archive
    for i in order:
      full = insert(full, population([rows[i]], i), np.ones(2) * 2)
    assert sorted(full.choices[:, 0].tolist()) == sorted(order[:2])


@pytest.mark.parametrize('scale', [1e-30, 1.0, 1e30])
def test_the_scale_of_an_objective_does_not_matter(scale):
  rng = np.random.default_rng(0)
  rows = smooth(rng, (2, OFFERED, 3)).astype(np.float32)
  units = np.array([scale, 1, 1 / scale], np.float32)
  plain = scaled = pareto.empty_population(CAPACITY, 1, 3)
  for part in rows:
    plain = insert(plain, population(part), np.ones(3, np.float32))
    scaled = insert(scaled, population(part * units), units)
  np.testing.assert_array_equal(scaled.choices, plain.choices)


def test_without_a_reference_it_is_a_tenth_behind_the_worst():
  place = np.linspace(0, 1, 40)
  rows = np.stack([place, (1 - place) ** 2], axis=1)
  archive = pareto.empty_population(CAPACITY, 1, 2)
  found = insert(archive, population(rows))
  told = insert(archive, population(rows), np.full(2, 1.1))
  np.testing.assert_array_equal(found.choices, told.choices)
  assert len(kept(found)) == CAPACITY


def test_of_very_many_too_many_none_that_share_go_together():
  """Pairs of near copies: whatever goes, its partner stays."""
  rng = np.random.default_rng(0)
  rows = smooth(rng, (150, 3)).astype(np.float32)
  rows = front_of(rows.astype(np.float64))[:60]
  pairs = np.concatenate([rows, rows * (1 + 1e-4 * np.array([1, 0, -1]))])
  archive = pareto.empty_population(len(rows), 1, 3)
  found = insert(archive, population(pairs), np.full(3, 1.5))
  assert volume(kept(found), np.full(3, 1.5)) > 0.9999 * volume(
    pairs, np.full(3, 1.5)
  )


def test_of_four_objectives_the_least_crowded_stay():
  place = np.array([0, 1, 10, 20, 30, 40, 100], np.float32)
  rows = np.stack([place, 100 - place, place, 100 - place], axis=1)
  archive = pareto.empty_population(6, 1, 4)
  found = insert(archive, population(rows))
  np.testing.assert_array_equal(
    np.sort(found.choices[:, 0]), [0, 2, 3, 4, 5, 6]
  )


def test_of_one_objective_the_best_alone_is_kept():
  archive = pareto.empty_population(2, 1, 1)
  found = insert(archive, population([[3.0], [1.0], [2.0], [1.0]]))
  np.testing.assert_array_equal(found.objectives[:, 0], [1, np.inf])


@pytest.mark.parametrize(
  ('change', 'words'),
  [
    ({'species': np.zeros(2, np.int32)}, r'species: the shape is \(2,\)'),
    ({'choices': np.zeros((3, 1))}, 'choices: the type is float32'),
    ({'choices': np.zeros((3, 4), np.int32)}, '4 nodes; the archive has 1'),
    ({'objectives': np.zeros((3, 2))}, r'\(3, 2\); give \[3, 3\]'),
  ],
)
def test_candidates_that_do_not_fit_are_refused(change, words):
  archive = pareto.empty_population(4, 1, 3)
  candidates = population(np.zeros((3, 3)))._replace(**change)
  with pytest.raises(InputError, match=words):
    pareto.archive_insert(archive, candidates)


@pytest.mark.parametrize('capacity', [0, -1, 1.5, None])
def test_an_archive_has_slots(capacity):
  with pytest.raises(InputError, match='give a whole number from 1'):
    pareto.empty_population(capacity, 1, 3)
