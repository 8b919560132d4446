"""Knapsacks: joint choices and greedy fronts against brute force."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_jax.core.types import InputError
from nemo_jax.quantization import costs as costs_lib
from nemo_jax.quantization import transform
from nemo_jax.search import knapsack
from tests.search.knapsacks import (
  COUNT,
  EVERY,
  FREE,
  WIDTHS,
  falling,
  few,
  instance,
  known,
  prices,
  seeds,
)

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


def test_quantizers_that_are_multiplied_choose_together(structure):
  names = [q.name for q in structure.quantizers]
  found = knapsack.groups(known(falling(0, len(names)), structure.costs))
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
  found = knapsack.groups(known(table, costs))
  choices = np.zeros((1, len(table)), np.int32)
  for group in found:
    choices[0, group.nodes] = rng.choice(group.choices)
  ((loss, size, work),) = knapsack.totals(found, choices)
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


# Groups.


@few
@given(seeds, st.booleans())
def test_no_choice_is_dominated_and_none_is_lost(seed, whole):
  table, costs = instance(seed, whole)
  found = knapsack.groups(known(table, costs))
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
  found = knapsack.groups(known(table, costs), allowed)
  nodes = np.arange(COUNT)
  for row in knapsack.front(found, COUNT):
    assert np.all(allowed[nodes, row])
  assert np.all(allowed[nodes, knapsack.optimum(found, COUNT, FREE)])


def test_a_node_without_a_choice_is_named():
  table, costs = instance(0)
  allowed = np.ones(table.shape, bool)
  allowed[4] = False
  with pytest.raises(InputError, match='leaves node 4 no choice'):
    knapsack.groups(known(table, costs), allowed)


def test_too_many_joint_choices_are_refused():
  """Ten weights of one activation at three widths: 3^11."""
  ones = np.ones(11, np.int64)
  operands = np.asarray([(0, n) for n in range(1, 11)], np.int32)
  costs = costs_lib.Costs(ones, 0, 11, ones[1:], operands)
  with pytest.raises(InputError, match='^11 nodes.*too many joint'):
    knapsack.groups(known(np.ones((11, 3)), costs))
  assert len(knapsack.groups(known(np.ones((11, 1)), costs, WIDTHS[:1]))) == 1


def test_what_is_not_among_the_choices_has_no_totals():
  table, costs = instance(0)
  allowed = np.ones(table.shape, bool)
  allowed[3, 1] = False
  found = knapsack.groups(known(table, costs), allowed)
  with pytest.raises(InputError, match='not among the choices'):
    knapsack.totals(found, np.ones((1, COUNT), np.int32))


# Fronts.


def below(a, b):
  """Whether a is no greater than b, but for rounding."""
  return np.all(a <= b + 1e-9 * np.abs(b))


@few
@given(seeds, st.booleans())
@pytest.mark.parametrize('share', [0, 0.5, 1])
def test_greedy_is_the_lower_convex_hull(share, seed, whole):
  table, costs = instance(seed, whole)
  found = knapsack.groups(known(table, costs))
  weights = np.asarray([1 - share, share])
  rows = knapsack.greedy(found, COUNT, weights)

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
  found = knapsack.groups(known(*instance(seed, whole)))
  rows = knapsack.front(found, COUNT, shares=3)
  assert rows.dtype == np.int32
  held = [tuple(row) for row in rows]
  assert len(set(held)) == len(held)
  span = sum(np.ptp(group.costs, axis=0) for group in found)
  span = np.where(span > 0, span, 1)
  of_shares = [
    knapsack.greedy(found, COUNT, np.asarray(weights, np.float32) / span)
    for weights in ((0, 1), (0.5, 0.5), (1, 0))
  ]
  assert set(held) == {tuple(row) for rows in of_shares for row in rows}
