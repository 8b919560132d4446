"""Optima of knapsacks within budgets, against brute force and greedy fronts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_jax.core.types import InputError
from nemo_jax.quantization import costs as costs_lib
from nemo_jax.search import knapsack
from tests.search.knapsacks import (
  COUNT,
  EVERY,
  FREE,
  falling,
  few,
  instance,
  known,
  prices,
  seeds,
)


def only(which, budget):
  """Budgets of which one is not infinite."""
  return [budget if i == which else np.inf for i in range(2)]


def within(values, size, work):
  """Which rows of `prices` keep both budgets."""
  used = values[:, 1:] <= np.asarray([size, work]) * (1 + 1e-9)
  return np.all(used, axis=1)


@few
@given(seeds, st.booleans(), st.sampled_from(['size', 'work', 'both', 'none']))
def test_the_optimum_is_the_least_of_all_configurations(seed, whole, budgets):
  """Budgets are what some configuration takes, to the last bit."""
  rng = np.random.default_rng(seed)
  table, costs = instance(seed, whole)
  every = prices(table, costs, EVERY)
  size, work = every[rng.integers(len(every)), 1:]
  size = size if budgets in ('size', 'both') else np.inf
  work = work if budgets in ('work', 'both') else np.inf
  found = knapsack.groups(known(table, costs))
  row = knapsack.optimum(found, COUNT, (size, work))
  assert row.dtype == np.int32
  values = prices(table, costs, row[None])
  assert within(values, size, work)
  best = every[within(every, size, work), 0].min()
  np.testing.assert_allclose(values[0, 0], best, rtol=1e-5)


@few
@given(seeds, st.sampled_from([1e-5, 1e-7, 1e-8, 1e-9]))
@pytest.mark.parametrize('which', [0, 1])
def test_a_budget_is_kept_by_a_hair(which, seed, hair):
  """What takes the least bit more than there is does not fit."""
  rng = np.random.default_rng(seed)
  table, costs = instance(seed)
  found = knapsack.groups(known(table, costs))
  every = prices(table, costs, EVERY)[:, 1 + which]
  middle = rng.choice(every[every > np.median(every)])
  best = knapsack.optimum(found, COUNT, only(which, middle))
  budget = knapsack.totals(found, best[None])[0, 1 + which] * (1 - hair)
  second = knapsack.optimum(found, COUNT, only(which, budget))
  assert knapsack.totals(found, second[None])[0, 1 + which] <= budget


@pytest.mark.parametrize('which', [0, 1])
def test_a_budget_below_the_cheapest_is_refused(which):
  table, costs = instance(0)
  found = knapsack.groups(known(table, costs))
  cheapest = sum(np.min(group.costs[:, which]) for group in found)
  assert np.all(knapsack.optimum(found, COUNT, only(which, cheapest))[2:5] == 0)
  for budget in (cheapest * 0.999, 0, -1):
    with pytest.raises(InputError, match='no configuration has costs'):
      knapsack.optimum(found, COUNT, only(which, budget))


def test_where_nothing_is_lost_anything_is_the_optimum():
  _, costs = instance(0)
  found = knapsack.groups(known(np.zeros((COUNT, 3)), costs))
  assert knapsack.optimum(found, COUNT, FREE).tolist() == [0] * COUNT


@pytest.mark.parametrize('seed', range(3))
def test_no_front_beats_the_optimum_of_a_large_network(seed):
  """Losses over six orders of magnitude, of which the last still count."""
  layers, widths = 30, range(2, 17)
  rng = np.random.default_rng(seed)
  elements = np.zeros(2 * layers, np.int64)
  elements[1::2] = 10 ** rng.uniform(2, 6, layers)
  costs = costs_lib.Costs(
    elements=elements,
    overhead_bits=0,
    parameters=int(elements.sum()),
    macs=(10 ** rng.uniform(5, 8, layers)).astype(np.int64),
    operands=np.arange(2 * layers, dtype=np.int32).reshape(-1, 2),
  )
  found = knapsack.groups(
    known(falling(seed, 2 * layers, widths), costs, widths)
  )
  rows = knapsack.front(found, 2 * layers)
  values = knapsack.totals(found, rows)
  for index in (len(rows) // 4, len(rows) // 2, len(rows) - 1):
    _, size, work = values[index]
    ours = knapsack.optimum(found, 2 * layers, (size, work))
    best = knapsack.totals(found, ours[None])
    assert within(best, size, work)
    fits = within(values, size, work)
    assert best[0, 0] <= values[fits, 0].min() * (1 + 1e-6)
