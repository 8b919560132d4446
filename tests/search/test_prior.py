"""The additive prior against brute force and against exact costs."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_jax.core.types import InputError
from nemo_jax.quantization import costs, transform
from nemo_jax.search import prior as prior_lib
from nemo_jax.search import progress, species
from nemo_jax.search.problem import Prior
from nemo_jax.tasks.cost_prior import make_prior
from tests.additive import additive_problem
from tests.placement import placement_problem

WIDTHS = (2, 3, 5, 8)
OTHERS = ('priced_gcn', 'direct')  # that start from a prior
cheapest = jax.jit(prior_lib.cheapest, static_argnames='hops')
totals_of = jax.jit(jax.vmap(prior_lib.totals, in_axes=(None, 0)))


class Branches(nn.Module):
  """Two layers that share their input, one after them, a product of both."""

  @nn.compact
  def __call__(self, x):
    a = nn.relu(nn.Conv(4, (3, 3), name='a')(x))
    b = nn.Conv(4, (1, 1), name='b')(x)
    y = nn.relu(a + b).reshape(len(x), -1, 4)
    return nn.Dense(3, name='c')(jnp.einsum('bik,bjk->bij', y, y).mean(1))


@pytest.fixture(scope='module')
def table():
  images = jnp.zeros((1, 4, 4, 2))
  variables = jax.eval_shape(Branches().init, jax.random.key(0), images)
  return transform.inspect(Branches().apply, variables, images).costs


def draw_prior(seed, pairs, nodes=5, choices=3, priced=2):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  return Prior(
    loss=draw(nodes, choices),
    costs=draw(nodes, choices, priced),
    pairs=np.asarray(pairs, np.int32).reshape(-1, 2),
    pair_costs=draw(len(pairs), choices, choices, priced),
  )


def everything(nodes, choices):
  return np.array(list(itertools.product(range(choices), repeat=nodes)))


@pytest.mark.parametrize('names', [costs.NAMES, ('bit_operations', 'size'), ()])
def test_costs_are_those_of_the_network_but_for_a_constant(table, names):
  rng = np.random.default_rng(0)
  shape = len(table.elements), len(WIDTHS)
  known = make_prior(table, rng.normal(size=shape), WIDTHS, names)
  rows = rng.integers(0, len(WIDTHS), (20, shape[0]))
  found = np.asarray(totals_of(known, rows))
  bits = np.asarray(WIDTHS)[rows]
  of = {
    'size': lambda b: costs.size_ratio(table, b),
    'bit_operations': lambda b: costs.bit_operation_ratio(table, b),
    'bit_operations_larger': lambda b: costs.bit_operation_ratio(
      table, b, 'larger'
    ),
  }
  loss = known.loss[np.arange(shape[0]), rows].sum(axis=1)
  np.testing.assert_allclose(found[:, 0], loss, rtol=1e-4, atol=1e-5)
  assert found.shape[1] == 1 + len(names)
  for i, name in enumerate(names, start=1):
    exact = np.asarray([of[name](b) for b in bits])
    np.testing.assert_allclose(np.ptp(found[:, i] - exact), 0, atol=1e-6)


@pytest.mark.parametrize(
  'pairs',
  [
    [],
    [(0, 1), (0, 2), (3, 4)],
    [(0, 1), (1, 2), (2, 3), (3, 4)],
    [(2, 0), (2, 1), (3, 2), (4, 3)],
  ],
  ids=['none', 'stars', 'chain', 'tree'],
)
@settings(max_examples=25)
@given(seed=st.integers(0, 2**31 - 1))
def test_on_trees_the_cheapest_is_the_cheapest(pairs, seed):
  known = draw_prior(seed, pairs)
  rng = np.random.default_rng(seed)
  prices = rng.exponential(size=2).astype(np.float32)
  shape = (5, 3) if seed % 2 else (5,)
  factors = rng.exponential(size=shape).astype(np.float32)
  allowed = rng.random((5, 3)) < 0.7
  allowed[np.arange(5), rng.integers(0, 3, 5)] = True
  hops = prior_lib.rounds(known)
  row = cheapest(known, allowed, prices, factors, hops=hops)
  rows = everything(5, 3)
  rows = rows[allowed[np.arange(5), rows].all(axis=1)]
  scaled = known._replace(loss=factors.reshape(5, -1) * known.loss)
  price = totals_of(scaled, rows)
  price = np.asarray(price) @ np.concatenate([[1], prices])
  own = totals_of(scaled, row[None])[0] @ np.asarray([1, *prices])
  assert allowed[np.arange(5), row].all()
  assert own <= price.min() + 1e-4


def test_where_pairs_form_a_ring_it_is_near():
  known = draw_prior(3, [(0, 1), (1, 2), (2, 3), (3, 4), (4, 0)])
  rows, ones = everything(5, 3), np.ones(5, np.float32)
  price = totals_of(known, rows)
  price = np.asarray(price) @ [1, 1, 1]
  row = cheapest(known, np.ones((5, 3), bool), ones[:2], ones, hops=8)
  own = np.asarray(totals_of(known, row[None])[0]) @ [1, 1, 1]
  assert own < np.percentile(price, 5)


def test_rounds_reach_across_the_largest_tree():
  for pairs, expected in (
    ([], 0),
    ([(0, 1)], 1),
    ([(0, 1), (0, 2), (3, 4)], 2),
    ([(0, 1), (1, 2), (2, 3), (3, 4)], 4),
  ):
    assert prior_lib.rounds(draw_prior(0, pairs)) == expected
  long = draw_prior(0, [(i, i + 1) for i in range(29)], nodes=30)
  assert prior_lib.rounds(long) == prior_lib.MOST_ROUNDS


def test_prices_at_random_reach_all_of_the_convex_front():
  """Whatever the costs are worth, what is best then is nearly met."""
  problem = placement_problem(5)
  known = problem.prior
  rows = np.unique(prior_lib.front(jax.random.key(0), problem, 3000), axis=0)
  options = [np.flatnonzero(row) for row in np.asarray(problem.allowed)]
  every = np.asarray(list(itertools.product(*options)))
  values, found = (np.asarray(totals_of(known, r)) for r in (every, rows))
  spans = np.ptp(values, axis=0)
  missed, rng = 0, np.random.default_rng(0)
  for weights in rng.dirichlet(np.ones(values.shape[1]), 200):
    best = (values / spans @ weights).min()
    missed += (found / spans @ weights).min() > best + 1e-5
  assert missed <= 20


def test_exchange_rates_are_where_the_choice_changes():
  """One node, one cost: the ends of the interval in which it is chosen."""
  known = Prior(
    loss=np.array([[4.0, 1.0, 0.0]], np.float32),
    costs=np.array([[[0.0], [0.5], [1.0]]], np.float32),
    pairs=np.zeros((0, 2), np.int32),
    pair_costs=np.zeros((0, 3, 3, 1), np.float32),
  )
  np.testing.assert_allclose(prior_lib.exchange_rates(known), [2, 6])
  chosen = [
    int(cheapest(known, np.ones((1, 3), bool), p, np.ones(1), hops=0)[0])
    for p in np.array([[1.9], [2.1], [5.9], [6.1]], np.float32)
  ]
  assert chosen == [2, 1, 1, 0]


@pytest.mark.parametrize('name', ['lagrangian', 'priced_gcn'])
def test_without_a_prior_it_says_what_is_missing(name):
  problem = placement_problem(4)
  blind = problem.replace(prior=None)
  empty = problem.prior._replace(
    costs=problem.prior.costs[..., :0],
    pair_costs=problem.prior.pair_costs[..., :0],
  )
  for other in (blind, problem.replace(prior=empty)):
    with pytest.raises(InputError, match='give make_problem sensitivities'):
      species.find(name)(other, 8)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['lagrangian', *OTHERS])
def test_the_first_generation_is_near_the_front_of_the_prior(name):
  problem = additive_problem()
  one = species.find(name)(problem, 32)
  asked, _ = jax.jit(one.ask)(jax.random.key(1), one.init(jax.random.key(0)))
  blind = species.find('direct')(problem.replace(prior=None), 32)
  other, _ = jax.jit(blind.ask)(
    jax.random.key(1), blind.init(jax.random.key(0))
  )
  price = jax.vmap(problem.evaluate, in_axes=(None, 0))
  volume = lambda rows: progress.hypervolume(problem, price(problem.data, rows))
  assert volume(asked) > 1.1 * volume(other)


def test_sensitivities_that_do_not_fit_are_refused(table):
  count = len(table.elements)
  for bad in (np.zeros((count, 3)), np.full((count, len(WIDTHS)), np.nan)):
    with pytest.raises(InputError, match='sensitivities have shape'):
      make_prior(table, bad, WIDTHS, costs.NAMES)
