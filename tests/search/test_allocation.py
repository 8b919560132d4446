"""How many places each species gets, by what it is worth."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import moocore
import numpy as np
import pytest

from nemo_jax.core.types import InputError
from nemo_jax.search import allocation

allocate = jax.jit(allocation.allocate)
apportion = jax.jit(allocation.apportion)
owners_of = jax.jit(allocation.owners_of, static_argnums=1)
place_of = jax.jit(allocation.place_of)
utility = jax.jit(allocation.utility, static_argnums=(0, 3, 4))

# Few numbers of species, each of which is a program.
counts = st.sampled_from([1, 2, 3, 8])
scores = st.tuples(
  st.one_of(st.floats(0.01, 10), st.just(np.inf)), st.integers(1, 10_000)
)


@hypothesis.given(
  counts.flatmap(lambda n: st.lists(scores, min_size=n, max_size=n)),
  st.integers(16, 200),
  st.floats(0, 3),
)
@hypothesis.settings(max_examples=200)
def test_allocation_is_a_partition(scores, places, exploration):
  worth, evaluations = map(np.asarray, zip(*scores, strict=True))
  sizes = allocate(worth.astype(np.float32), evaluations, places, exploration)
  assert sizes.dtype == jnp.int32
  assert int(sizes.sum()) == places
  assert int(sizes.min()) >= 2


def test_allocation_follows_utility_and_curiosity():
  share = functools.partial(allocate, places=100)
  even, same = np.array([100, 100, 100]), np.full(3, 0.2)
  sizes = share(np.array([0.1, 0.2, 0.3]), even, exploration=1.0)
  assert sizes[0] > sizes[1] > sizes[2]
  sizes = share(same, np.array([10, 100, 1000]), exploration=1.0)
  assert sizes[0] > sizes[1] > sizes[2]
  np.testing.assert_array_equal(
    np.sort(share(same, even, exploration=1.0)), [33, 33, 34]
  )
  dead = share(np.array([0.1, np.inf, 0.2]), even, exploration=0.0)
  assert int(dead[1]) == 2


def test_allocation_is_the_formula():
  worth, evaluations = np.array([0.1, 0.2, 0.4]), np.array([50, 30, 20])
  bonus = np.sqrt(np.log(100) / evaluations)
  score = (0.4 - worth) / 0.3 + 0.5 * bonus
  exact = 2 + score / score.sum() * (60 - 6)
  sizes = allocate(worth, evaluations, 60, 0.5)
  assert np.all(np.abs(np.asarray(sizes) - exact) < 1)


def test_allocation_without_an_end_of_curiosity_is_equal():
  sizes = allocate(np.array([0.1, 0.9, 0.5]), np.arange(3), 30, np.inf)
  np.testing.assert_array_equal(sizes, [10, 10, 10])


def test_allocation_does_not_wrap_where_evaluations_are_many():
  many = np.array([2**31 - 1, 2**20], np.int32)
  sizes = allocate(np.array([0.1, 0.1]), many, 100, 1.0)
  # sqrt(ln(2^31) / 2^20) is not nothing; of 2^31 it nearly is.
  assert sizes[1] > sizes[0]


@hypothesis.given(
  counts.flatmap(lambda n: st.lists(st.floats(0.01, 1), min_size=n, max_size=n))
)
def test_places_are_by_the_largest_remainder(shares):
  shares, places = np.asarray(shares, np.float32), 50
  exact = shares / shares.sum() * (places - 2 * len(shares))
  sizes = np.asarray(apportion(shares, places)) - 2
  assert sizes.sum() + 2 * len(shares) == places
  assert (np.abs(sizes - exact) < 1 + 1e-4).all()
  # Nobody is rounded down for the sake of a smaller remainder.
  rest = exact - np.floor(exact)
  up, down = rest[sizes > exact], rest[sizes < exact]
  assert not len(up) or not len(down) or up.min() > down.max() - 1e-4


@hypothesis.given(counts.flatmap(lambda n: st.permutations(range(2, 2 + n))))
def test_rows_of_a_species_lie_together_and_are_numbered(sizes):
  owners = owners_of(np.asarray(sizes), sum(sizes))
  expected = np.repeat(np.arange(len(sizes)), sizes)
  np.testing.assert_array_equal(owners, expected)
  places = np.concatenate([np.arange(size) for size in sizes])
  np.testing.assert_array_equal(place_of(owners), places)


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


@pytest.mark.parametrize(
  ('exploration', 'kind', 'objectives', 'words'),
  [
    (np.nan, 'r2', 3, 'exploration is nan; give 0 or more'),
    (-1.0, 'r2', 3, 'exploration is -1.0; give 0 or more'),
    (1.0, 'luck', 3, "'luck'; the choices are r2, hypervolume, front_count"),
    (1.0, 'hypervolume', 4, 'needs two or three objectives'),
    (1.0, 'hypervolume', 1, 'needs two or three objectives'),
  ],
)
def test_options_out_of_range_are_refused(exploration, kind, objectives, words):
  with pytest.raises(InputError, match=words) as caught:
    allocation.check_options(exploration, kind, objectives)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize('kind', allocation.UTILITIES)
def test_options_within_range_are_taken(kind):
  for exploration in (0, 1.5, np.inf):
    allocation.check_options(exploration, kind, 3)
  # What is traced cannot be told.
  jax.eval_shape(lambda x: allocation.check_options(x, kind, 2), 1.0)


def test_two_places_for_each_species_are_enough():
  allocation.check_size(6, 3)
  with pytest.raises(InputError, match='of 5 is too small for 3 species'):
    allocation.check_size(5, 3)
  with pytest.raises(InputError, match='there are no species'):
    allocation.check_size(5, 0)
