"""Budgets: what words stand for, and what is within them."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_jax import InputError
from nemo_jax.quantization import costs
from nemo_jax.quantization.structure import inspect
from nemo_jax.search import knapsack
from nemo_jax.tasks import budgets
from nemo_jax.tasks.cost_prior import make_prior
from tests import tiny

WIDTHS = (2, 4, 8)
STRUCTURE = inspect(
  tiny.apply,
  tiny.variables(),
  jax.ShapeDtypeStruct((2, tiny.FEATURES), np.float32),
)
COSTS = STRUCTURE.costs
IS_WEIGHT = [q.is_weight for q in STRUCTURE.quantizers]
COUNT = len(IS_WEIGHT)


def both(bits) -> tuple[float, float]:
  """Megabytes and 10^9 bit-operations."""
  return costs.model_size(COSTS, bits) / 8e6, (
    costs.bit_operations(COSTS, bits) / 1e9
  )


@given(st.lists(st.integers(2, 16), min_size=COUNT, max_size=COUNT))
def test_what_bits_take_is_a_budget_that_they_keep(bits):
  bits = np.asarray(bits)
  size, work = both(bits)
  word = f'{size:.15f}MB+{work:.15f}G'
  found = budgets.parse(word, COSTS)
  np.testing.assert_allclose(found, budgets.ratios(COSTS, bits), rtol=1e-5)


@pytest.mark.parametrize('width', WIDTHS)
def test_a_number_of_bits_stands_for_what_these_take_everywhere(width):
  found = budgets.parse(str(width), COSTS, WIDTHS)
  assert found == budgets.ratios(COSTS, np.full(COUNT, width))
  # Of the float network, without scales.
  elements = COSTS.elements.sum() / COSTS.parameters
  assert found[0] == pytest.approx(width / 32 * elements)
  assert found[1] == pytest.approx((width / 32) ** 2)


def test_one_limit_leaves_the_other_cost_free():
  size, work = budgets.parse('1MB', COSTS)
  assert np.isinf(work)
  assert size * 32 * COSTS.parameters == 8e6 - COSTS.overhead_bits
  size, work = budgets.parse('2.5G', COSTS)
  assert np.isinf(size)
  assert work == pytest.approx(2.5e9 / (32**2 * COSTS.macs.sum()))


@pytest.mark.parametrize(
  'word',
  ['', '1', '9', '1GB', '5TB', 'MB', '-1MB', '1e3MB', 'nanMB', '1MB+2MB']
  + ['1 MB', '1MB+', '+', '1MB+2G+3G', '２MB', '1MB\n', '9' * 16 + 'MB'],
)
def test_what_is_no_budget_lists_what_is(word):
  with pytest.raises(InputError, match='they are such as 1.5MB, 5G') as caught:
    budgets.parse(word, COSTS)
  assert 'from 2 to 8' in str(caught.value)


def test_a_budget_below_the_fewest_bits_is_refused():
  least = budgets.parse('2', COSTS)
  budgets.check({'2': least}, STRUCTURE)
  tight = tuple(0.999 * x for x in least)
  for word, budget in (
    ('small', (tight[0], np.inf)),
    ('quick', (np.inf, tight[1])),
  ):
    words = f'{word} is too little: the fewest bits take .*MB and .*G'
    with pytest.raises(InputError, match=words):
      budgets.check({'2': least, word: budget}, STRUCTURE)


def test_fixed_activations_take_more():
  budget = {'2': budgets.parse('2', COSTS)}
  with pytest.raises(InputError, match='2 is too little'):
    budgets.check(budget, STRUCTURE, activation_bits=8)
  wide = budgets.ratios(COSTS, np.where(IS_WEIGHT, 2, 8))
  budgets.check({'wide': wide}, STRUCTURE, activation_bits=8)
  with pytest.raises(InputError, match='wide is too little'):
    budgets.check({'wide': wide}, STRUCTURE, activation_bits=8, lowest=3)


def test_only_activations_are_fixed():
  assert budgets.allowed(IS_WEIGHT, WIDTHS).all()
  table = budgets.allowed(IS_WEIGHT, WIDTHS, 4)
  assert table.shape == (COUNT, 3)
  for is_weight, row in zip(IS_WEIGHT, table, strict=True):
    assert row.tolist() == ([True] * 3 if is_weight else [False, True, False])


@pytest.fixture(scope='module')
def solved():
  """Groups of a knapsack on the tiny network, and its greedy front."""
  loss = np.outer([1.0, 4.0, 0.5, 2.0], 4.0 ** -np.asarray(WIDTHS))
  prior = make_prior(COSTS, loss, WIDTHS, budgets.COSTS)
  allowed = budgets.allowed(IS_WEIGHT, WIDTHS)
  groups = knapsack.groups(prior, allowed)
  return groups, knapsack.front(groups, COUNT)


def test_the_best_within_a_budget_loses_least_of_those_that_keep_it(solved):
  groups, rows = solved
  values = knapsack.totals(groups, rows)
  for word in ('2', '4', '8'):
    budget = budgets.parse(word, COSTS, WIDTHS)
    row = budgets.best_within(groups, rows, budget)
    bits = np.asarray(WIDTHS)[row]
    found = budgets.ratios(COSTS, bits)
    assert all(x <= b * (1 + 1e-9) for x, b in zip(found, budget, strict=True))
    kept = (values[:, 1:] <= np.asarray(budget) * (1 + 1e-9)).all(axis=1)
    (lost, *_) = knapsack.totals(groups, row[None])[0]
    assert lost == values[kept, 0].min()


def test_nothing_is_within_less_than_the_least(solved):
  with pytest.raises(InputError, match='nothing is as small as'):
    budgets.best_within(*solved, (1e-4, np.inf))
