"""Variation operators against pymoo, exact probabilities and brute force."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pymoo.core.population import Population as PymooPopulation
from pymoo.core.problem import Problem as PymooProblem
from pymoo.operators.crossover.sbx import SBX
from pymoo.operators.mutation.pm import PM
from scipy import stats

from nemo_jax.search import variation

sbx = jax.jit(variation.sbx)
mutate = jax.jit(variation.polynomial_mutation)
nearest = jax.jit(variation.nearest_allowed)
tournaments = jax.jit(jax.vmap(variation.tournament, in_axes=(0, None, None)))

LOW, HIGH = 0.0, 7.0
SAMPLES = 40_000
# All are numbers of float32, so that no cast moves a parent. The last pairs
# lie at, and just inside, the bounds.
PAIRS = [
  (2.0, 5.0),
  (5.0, 2.0),
  (3.0, 3.25),
  (0.015625, 1.0),
  (0.5, 5.0),
  (6.0, 6.984375),
  (0.0, 7.0),
  (0.0, 0.5),
  (7.0, 6.5),
]
POINTS = [0.0, 0.015625, 0.5, 3.0, 6.5, 6.984375, 7.0]

by_example = settings(max_examples=60, deadline=None, derandomize=True)


# Denormal numbers, which XLA takes for zero, are left out.
shares = st.just(0.0) | st.floats(2.0**-20, 1, width=32)


@st.composite
def bounded(draw, genotypes):
  """Bounds, and that many genotypes [4, 3] within them, some at the bounds."""
  low = np.float32(draw(shares)) * 8 - 4
  high = low + np.float32(0.5 + 15 * draw(shares))
  inside = hnp.arrays(np.float32, (4, 3), elements=shares)
  parents = [
    np.clip(low + draw(inside) * (high - low), low, high)
    for _ in range(genotypes)
  ]
  return low, high, parents


etas = st.sampled_from([1.0, 15.0, 20.0, 100.0])
seeds = st.integers(0, 2**31 - 1)


def pymoo_problem(count):
  return PymooProblem(n_var=count, xl=np.full(count, LOW), xu=HIGH)


def same_distribution(ours, theirs):
  # Seeds are fixed, so that this is no gamble: it fails always or never.
  assert stats.ks_2samp(ours, theirs).pvalue > 1e-3


def near_share(count, total, share):
  """A count lies within four standard deviations of what is expected."""
  spread = np.sqrt(share * (1 - share) / total)
  np.testing.assert_allclose(count / total, share, rtol=0, atol=4 * spread)


# Random numbers.


@pytest.mark.parametrize('count', [1, 31, 32, 33, 100])
def test_coins_are_fair_and_independent(count):
  throws = 4000
  sides = np.asarray(variation.coins(jax.random.key(0), (throws, count)))
  assert sides.shape == (throws, count)
  assert (abs(sides.mean(axis=0) - 0.5) < 5 / (2 * np.sqrt(throws))).all()
  same = (sides[:, 1:] == sides[:, :-1]).mean(axis=0)
  assert (abs(same - 0.5) < 5 / (2 * np.sqrt(throws))).all()


@pytest.mark.parametrize('rate', [0.05, 0.5, 1.0])
def test_sparse_noise_is_normal_where_it_is(rate):
  draw = jax.jit(lambda key: variation.sparse_normal(key, rate, (40_000,)))
  noise = np.asarray(draw(jax.random.key(1)))
  moved = noise[noise != 0]
  near_share(len(moved), len(noise), rate)
  assert stats.kstest(moved, 'norm').pvalue > 1e-3


# Crossover.


@by_example
@given(bounded(2), etas, seeds)
def test_sbx_stays_within_bounds(case, eta, seed):
  low, high, (one, two) = case
  child = np.asarray(sbx(jax.random.key(seed), one, two, low, high, eta))
  assert ((child >= low) & (child <= high)).all()


@by_example
@given(bounded(1), etas, seeds)
def test_sbx_leaves_equal_parents_alone(case, eta, seed):
  low, high, (one,) = case
  child = sbx(jax.random.key(seed), one, one, low, high, eta)
  np.testing.assert_array_equal(child, one)


@functools.cache
def crossed(eta):
  """Children [SAMPLES, pairs] of the first parents, ours and pymoo's."""
  pairs = np.array(PAIRS, np.float32)
  one, two = (np.tile(parents, (SAMPLES, 1)) for parents in pairs.T)
  ours = np.asarray(sbx(jax.random.key(0), one, two, LOW, HIGH, eta))
  # With `prob` every mating is crossed, with `prob_var` half of its variables;
  # `prob_exch` and `prob_bin` then let a child lie near either parent, one
  # variable at a time. Of the two children the first belongs to `one`.
  operator = SBX(prob=1.0, prob_var=0.5, eta=eta, prob_exch=1.0, prob_bin=0.5)
  mating = PymooPopulation.new('X', pairs.T)
  children = operator.do(
    pymoo_problem(len(pairs)),
    [mating] * SAMPLES,
    random_state=np.random.default_rng(0),
  ).get('X')[:SAMPLES]
  return ours, children.astype(np.float32)


@pytest.mark.parametrize('eta', [3.0, 15.0])
@pytest.mark.parametrize('pair', PAIRS, ids=str)
def test_sbx_has_the_distribution_of_pymoo(eta, pair):
  column = PAIRS.index(pair)
  ours, theirs = (children[:, column] for children in crossed(eta))
  same_distribution(ours, theirs)
  # Once more those that moved to either side, without the half that is equal
  # anyway: the two bounds have a spread each.
  middle = sum(pair) / 2
  for side in (np.less, np.greater):
    same_distribution(
      *(x[side(x, middle) & (x != pair[0])] for x in (ours, theirs))
    )


def test_sbx_crosses_every_second_variable_independently():
  ours, _ = crossed(15.0)
  moved = ours[:, :2] != np.array(PAIRS[:2], np.float32)[:, 0]
  near_share(moved.sum(0), SAMPLES, 0.5)
  near_share(moved.all(1).sum(), SAMPLES, 0.25)


# Mutation.


@by_example
@given(bounded(1), etas, seeds)
def test_mutation_stays_within_bounds(case, eta, seed):
  low, high, (genotype,) = case
  child = mutate(jax.random.key(seed), genotype, low, high, eta, 1.0)
  child = np.asarray(child)
  assert ((child >= low) & (child <= high)).all()


@functools.cache
def mutated(eta):
  """All of [SAMPLES, points] mutated, ours and pymoo's."""
  genotype = np.tile(np.array(POINTS, np.float32), (SAMPLES, 1))
  ours = mutate(jax.random.key(1), genotype, LOW, HIGH, eta, 1.0)
  # `prob` is that of a whole row, `prob_var` that of a variable.
  operator = PM(prob=1.0, prob_var=1.0, eta=eta)
  theirs = operator.do(
    pymoo_problem(len(POINTS)),
    PymooPopulation.new('X', genotype.astype(np.float64)),
    random_state=np.random.default_rng(1),
  ).get('X')
  return np.asarray(ours), theirs.astype(np.float32)


@pytest.mark.parametrize('eta', [3.0, 20.0])
@pytest.mark.parametrize('point', POINTS)
def test_mutation_has_the_distribution_of_pymoo(eta, point):
  column = POINTS.index(point)
  same_distribution(*(children[:, column] for children in mutated(eta)))


@pytest.mark.parametrize('nodes', [1, 4, 25])
def test_mutation_moves_one_variable_in_n(nodes):
  genotype = np.full((SAMPLES // nodes, nodes), 3, np.float32)
  child = mutate(jax.random.key(2), genotype, LOW, HIGH, 20.0)
  near_share((np.asarray(child) != 3).sum(), genotype.size, 1 / nodes)


# Selection.


@pytest.mark.parametrize('candidates', [[4], [1, 6], [0, 2, 3, 5, 7]], ids=str)
def test_the_better_of_two_candidates_wins_with_its_exact_probability(
  candidates,
):
  rank = np.array([5, 1, 0, 7, 2, 9, 3, 4], np.float32)
  allowed = np.isin(np.arange(8), candidates)
  keys = jax.random.split(jax.random.key(3), 2000)
  picked = np.asarray(tournaments(keys, rank, allowed))
  assert picked.shape == (2000, 8)
  counts = np.bincount(picked.ravel(), minlength=8)
  assert counts[~allowed].sum() == 0
  # Two are drawn with replacement. All better ones have to be missed twice,
  # but not this one as well.
  best_first = sorted(candidates, key=lambda i: rank[i])
  total = len(candidates)
  for place, row in enumerate(best_first):
    left = total - place
    share = (left**2 - (left - 1) ** 2) / total**2
    near_share(counts[row], picked.size, share)


def test_without_candidates_all_are_drawn_from():
  rank = np.full(5, np.inf, np.float32)
  keys = jax.random.split(jax.random.key(4), 2000)
  picked = np.asarray(tournaments(keys, rank, np.zeros(5, bool)))
  for count in np.bincount(picked.ravel(), minlength=5):
    near_share(count, picked.size, 1 / 5)


def test_a_member_without_a_rank_wins_over_none_that_has_one():
  rank = np.array([np.inf, 3], np.float32)
  keys = jax.random.split(jax.random.key(5), 2000)
  picked = np.asarray(tournaments(keys, rank, np.ones(2, bool)))
  near_share((picked == 0).sum(), picked.size, 1 / 4)


# Repair.


@by_example
@given(
  hnp.arrays(np.int32, (5, 4), elements=st.integers(0, 5)),
  hnp.arrays(bool, (4, 6)),
  hnp.arrays(np.int32, 4, elements=st.integers(0, 5)),
)
def test_nearest_allowed_is_the_nearest_and_on_a_tie_the_lower(
  choices, allowed, something
):
  allowed[np.arange(4), something] = True
  ours = np.asarray(nearest(choices, allowed))
  assert ours.dtype == np.int32
  for row, repaired in zip(choices, ours, strict=True):
    for node, wanted in enumerate(row):
      options = np.flatnonzero(allowed[node])
      assert repaired[node] == min(options, key=lambda i: (abs(i - wanted), i))


def test_nearest_allowed_breaks_a_tie_downwards():
  allowed = jnp.array([[True, False, True]])
  np.testing.assert_array_equal(nearest(jnp.array([[1]]), allowed), [[0]])
