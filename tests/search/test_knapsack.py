"""Knapsacks: joint choices, greedy fronts and optima against brute force."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_jax.arena.baselines import mckp
from nemo_jax.core.types import InputError
from nemo_jax.quantization import costs as costs_lib
from nemo_jax.quantization import transform

WIDTHS = (2, 4, 8)
FREE = (np.inf, np.inf)  # of any budget
seeds = st.integers(0, 2**31 - 1)
few = settings(max_examples=30)


# A network: one convolution, two layers that share an activation, and one
# whose weight is used twice.


def network(v, x):
  x = jax.lax.conv_general_dilated(
    x, v['conv'], (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
  )
  x = jax.nn.relu(x).reshape(len(x), -1)
  x = jax.nn.relu(x @ v['left'] + x @ v['right'])
  return jnp.tanh(x @ v['tied']) @ v['tied'] + v['bias']


@pytest.fixture(scope='module')
def structure():
  shapes = {
    'conv': (3, 3, 2, 4),
    'left': (64, 3),
    'right': (64, 3),
    'tied': (3, 3),
    'bias': (3,),
  }
  variables = {
    name: jax.ShapeDtypeStruct(shape, jnp.float32)
    for name, shape in shapes.items()
  }
  images = jax.ShapeDtypeStruct((2, 4, 4, 2), jnp.float32)
  return transform.inspect(network, variables, images)


def known(table, costs, widths=WIDTHS):
  return costs_lib.estimate(costs, table, widths, ('size', 'bit_operations'))


def falling(seed, count, widths=WIDTHS):
  """Sensitivities as real ones are: a quarter with each bit, about."""
  rng = np.random.default_rng(seed)
  start = 10 ** rng.uniform(-2, 2, size=(count, 1))
  noise = rng.uniform(0.5, 1.5, size=(count, len(widths)))
  return start * noise / 4.0 ** np.asarray(widths)


def test_quantizers_that_are_multiplied_choose_together(structure):
  names = [q.name for q in structure.quantizers]
  found = mckp.groups(known(falling(0, len(names)), structure.costs))
  assert [[names[i] for i in group.nodes] for group in found] == [
    ['conv:input', 'conv'],
    ['left:input', 'left', 'right'],
    ['tied:input', 'tied', 'tied#2:input'],
  ]
  for group in found:
    assert group.choices.shape == (len(group.loss), len(group.nodes))


@few
@given(seeds)
def test_totals_are_the_costs_of_the_network(structure, seed):
  """All but scales, zero points and biases, which no width changes."""
  rng, costs = np.random.default_rng(seed), structure.costs
  table = falling(seed, len(structure.quantizers))
  found = mckp.groups(known(table, costs))
  choices = np.zeros((1, len(table)), np.int32)
  for group in found:
    choices[0, group.nodes] = rng.choice(group.choices)
  ((loss, size, work),) = mckp.totals(found, choices)
  bits = np.asarray(WIDTHS)[choices[0]]
  constant = costs.overhead_bits / (32 * costs.parameters)
  np.testing.assert_allclose(
    size + constant, costs_lib.size_ratio(costs, bits), rtol=1e-6
  )
  np.testing.assert_allclose(
    work, costs_lib.bit_operation_ratio(costs, bits), rtol=1e-6
  )
  by_hand = sum(table[n, k] for n, k in enumerate(choices[0]))
  np.testing.assert_allclose(loss, by_hand, rtol=1e-12)


# Two activations, of which two weights share the first, and a weight that
# nothing multiplies.

OPERANDS = ((0, 2), (0, 3), (1, 4))
COUNT = 6
EVERY = np.asarray(list(itertools.product(range(len(WIDTHS)), repeat=COUNT)))


def instance(seed, whole=False):
  """(sensitivities, costs), spread or whole numbers.

  Those often tie, and ratios of them are exact: there are powers of two of
  parameters and of multiply-accumulates.
  """
  rng = np.random.default_rng(seed)
  if whole:
    table = rng.integers(0, 4, size=(COUNT, len(WIDTHS)))
    elements, macs = rng.integers(1, 4, 4), 1 + rng.multinomial(5, [1 / 3] * 3)
  else:
    table = falling(seed, COUNT)
    elements, macs = rng.integers(1, 10**6, 4), rng.integers(1, 10**6, 3)
  costs = costs_lib.Costs(
    elements=np.concatenate([[0, 0], elements]),
    overhead_bits=0,
    parameters=16 if whole else int(elements.sum()),
    macs=macs,
    operands=np.asarray(OPERANDS, np.int32),
  )
  return table, costs


def prices(table, costs, choices):
  """[P, 3]: loss, size and bit-operations, one term after the other."""
  rows = []
  for row in choices:
    bits = [WIDTHS[k] for k in row]
    loss = sum(table[n, k] for n, k in enumerate(row))
    size = sum(e * b for e, b in zip(costs.elements, bits, strict=True))
    work = sum(
      m * bits[a] * bits[b]
      for m, (a, b) in zip(costs.macs, OPERANDS, strict=True)
    )
    rows.append(
      [loss, size / 32 / costs.parameters, work / 32**2 / sum(costs.macs)]
    )
  return np.asarray(rows)


def below(a, b):
  """Whether a is no greater than b, but for rounding."""
  return np.all(a <= b + 1e-9 * np.abs(b))


@few
@given(seeds, st.booleans())
def test_no_choice_is_dominated_and_none_is_lost(seed, whole):
  table, costs = instance(seed, whole)
  found = mckp.groups(known(table, costs))
  assert [g.nodes.tolist() for g in found] == [[0, 2, 3], [1, 4], [5]]
  for group in found:
    rest = np.setdiff1d(range(COUNT), group.nodes)
    alone = EVERY[np.all(EVERY[:, rest] == 0, axis=1)]
    every = prices(table, costs, alone)
    rows = [
      np.flatnonzero(np.all(alone[:, group.nodes] == choice, axis=1))[0]
      for choice in group.choices
    ]
    for row in every:
      assert np.any(np.all(every[rows] <= row, axis=1))
    for row in every[rows]:
      better = np.all(every <= row, axis=1) & np.any(every < row, axis=1)
      assert not np.any(better)
    assert len(np.unique(every[rows], axis=0)) == len(rows)


@few
@given(seeds)
def test_only_what_is_allowed_is_chosen(seed):
  rng = np.random.default_rng(seed)
  table, costs = instance(seed)
  allowed = rng.random(table.shape) < 0.5
  allowed[np.arange(COUNT), rng.integers(len(WIDTHS), size=COUNT)] = True
  found = mckp.groups(known(table, costs), allowed)
  nodes = np.arange(COUNT)
  for row in mckp.front(found, COUNT):
    assert np.all(allowed[nodes, row])
  assert np.all(allowed[nodes, mckp.optimum(found, COUNT, FREE)])


def test_a_node_without_a_choice_is_named():
  table, costs = instance(0)
  allowed = np.ones(table.shape, bool)
  allowed[4] = False
  with pytest.raises(InputError, match='leaves node 4 no choice'):
    mckp.groups(known(table, costs), allowed)


def test_too_many_joint_choices_are_refused():
  """Ten weights of one activation at three widths: 3^11."""
  ones = np.ones(11, np.int64)
  operands = np.asarray([(0, n) for n in range(1, 11)], np.int32)
  costs = costs_lib.Costs(ones, 0, 11, ones[1:], operands)
  with pytest.raises(InputError, match='^11 nodes.*too many joint'):
    mckp.groups(known(np.ones((11, 3)), costs))
  assert len(mckp.groups(known(np.ones((11, 1)), costs, WIDTHS[:1]))) == 1


def test_what_is_not_among_the_choices_has_no_totals():
  table, costs = instance(0)
  allowed = np.ones(table.shape, bool)
  allowed[3, 1] = False
  found = mckp.groups(known(table, costs), allowed)
  with pytest.raises(InputError, match='not among the choices'):
    mckp.totals(found, np.ones((1, COUNT), np.int32))


# Fronts.


@few
@given(seeds, st.booleans())
@pytest.mark.parametrize('share', [0, 0.5, 1])
def test_greedy_is_the_lower_convex_hull(share, seed, whole):
  table, costs = instance(seed, whole)
  found = mckp.groups(known(table, costs))
  weights = np.asarray([1 - share, share])
  rows = mckp.greedy(found, COUNT, weights)

  def point(choices):
    loss, *used = prices(table, costs, choices).T
    return weights @ used, loss

  cost, loss = point(rows)
  # Every step costs more, loses less, and gains no more than the last.
  assert np.all(np.diff(cost) > 0)
  assert np.all(np.diff(loss) < 0)
  slopes = np.diff(loss) / np.diff(cost)
  assert below(slopes[:-1], slopes[1:])
  # Between its ends it lies below all there is.
  every = point(EVERY)
  cheapest = every[0] <= every[0].min() * (1 + 1e-9)
  np.testing.assert_allclose(cost[0], every[0].min(), rtol=1e-9)
  np.testing.assert_allclose(loss[0], every[1][cheapest].min(), rtol=1e-9)
  np.testing.assert_allclose(loss[-1], every[1].min(), rtol=1e-9)
  assert below(np.interp(every[0], cost, loss), every[1])


@few
@given(seeds, st.booleans())
def test_a_front_holds_the_fronts_of_all_shares_once(seed, whole):
  found = mckp.groups(known(*instance(seed, whole)))
  rows = mckp.front(found, COUNT, shares=3)
  assert rows.dtype == np.int32
  held = [tuple(row) for row in rows]
  assert len(set(held)) == len(held)
  span = sum(np.ptp(group.costs, axis=0) for group in found)
  span = np.where(span > 0, span, 1)
  of_shares = [
    mckp.greedy(found, COUNT, np.asarray(weights, np.float32) / span)
    for weights in ((0, 1), (0.5, 0.5), (1, 0))
  ]
  assert set(held) == {tuple(row) for rows in of_shares for row in rows}


# Optima.


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
  found = mckp.groups(known(table, costs))
  row = mckp.optimum(found, COUNT, (size, work))
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
  found = mckp.groups(known(table, costs))
  every = prices(table, costs, EVERY)[:, 1 + which]
  middle = rng.choice(every[every > np.median(every)])
  best = mckp.optimum(found, COUNT, only(which, middle))
  budget = mckp.totals(found, best[None])[0, 1 + which] * (1 - hair)
  second = mckp.optimum(found, COUNT, only(which, budget))
  assert mckp.totals(found, second[None])[0, 1 + which] <= budget


@pytest.mark.parametrize('which', [0, 1])
def test_a_budget_below_the_cheapest_is_refused(which):
  table, costs = instance(0)
  found = mckp.groups(known(table, costs))
  cheapest = sum(np.min(group.costs[:, which]) for group in found)
  assert np.all(mckp.optimum(found, COUNT, only(which, cheapest))[2:5] == 0)
  for budget in (cheapest * 0.999, 0, -1):
    with pytest.raises(InputError, match='no configuration has costs'):
      mckp.optimum(found, COUNT, only(which, budget))


def test_where_nothing_is_lost_anything_is_the_optimum():
  _, costs = instance(0)
  found = mckp.groups(known(np.zeros((COUNT, 3)), costs))
  assert mckp.optimum(found, COUNT, FREE).tolist() == [0] * COUNT


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
  found = mckp.groups(known(falling(seed, 2 * layers, widths), costs, widths))
  rows = mckp.front(found, 2 * layers)
  values = mckp.totals(found, rows)
  for index in (len(rows) // 4, len(rows) // 2, len(rows) - 1):
    _, size, work = values[index]
    ours = mckp.optimum(found, 2 * layers, (size, work))
    best = mckp.totals(found, ours[None])
    assert within(best, size, work)
    fits = within(values, size, work)
    assert best[0, 0] <= values[fits, 0].min() * (1 + 1e-6)
