"""What every species keeps to, in its protocol and in a search."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemo_jax.search import (
  neuroevolution,
  policies,
  progress,
  species,
  variation,
)
from nemo_jax.search import prior as prior_lib
from tests.placement import brute_force_front
from tests.search import alone
from tests.search.alone import PLACES
from tests.search.compiling import quickly
from tests.search.feedbacks import CHOICES, NODES, PROBLEM, some_feedback

GENERATIONS = 15


@functools.cache
def find(name):
  return alone.compiled(species.find(name)(PROBLEM, PLACES))


def search(name, start, key):
  learns = name == 'thompson'
  return alone.search(find(name), start, key, GENERATIONS, learns)


@functools.cache
def searched(name, seed=0):
  key = jax.random.key(seed)
  return search(name, key, key)


# They begin with the front of the prior, which has few points here.
INFORMED = ('direct', 'floor', 'lagrangian', 'priced_gcn', 'thompson')
# Much like others, and long to compile.
LATER = ('floor', 'graph_unet')


def named(names):
  """Tests for each species, slow ones for LATER."""
  rows = [
    pytest.param(name, marks=pytest.mark.slow) if name in LATER else name
    for name in names
  ]
  return pytest.mark.parametrize('name', rows)


every_species = named(species.names())
# Of the others there is none to inherit.
with_genotypes = named([n for n in species.names() if n != 'thompson'])


# The protocol.


@every_species
def test_offspring_are_choices_that_are_allowed(name):
  for seed in range(3):
    asked = searched(name, seed).asked
    generations, rows, nodes = asked.shape
    assert (generations, nodes) == (GENERATIONS, NODES)
    assert rows >= PLACES
    assert asked.dtype == np.int32
    assert ((asked >= 0) & (asked < CHOICES)).all()
    assert np.asarray(PROBLEM.allowed)[np.arange(NODES), asked].all()


@every_species
def test_shapes_and_types_stay_as_they_are(name):
  one = species.find(name)(PROBLEM, PLACES)
  key = jax.eval_shape(lambda: jax.random.key(0))
  state = jax.eval_shape(one.init, key)
  choices, asked = jax.eval_shape(one.ask, key, state)
  feedback = some_feedback(PLACES, asked=len(choices))
  told = jax.eval_shape(one.tell, key, asked, feedback)
  assert choices.shape[0] >= PLACES
  assert choices.shape[1:] == (NODES,)
  assert choices.dtype == jnp.int32
  assert jax.tree.structure(asked) == jax.tree.structure(state)
  assert jax.tree.structure(told) == jax.tree.structure(state)
  for before, *after in zip(
    *map(jax.tree.leaves, (state, asked, told)), strict=True
  ):
    assert not before.weak_type
    for leaf in after:
      assert leaf.shape == before.shape
      assert leaf.dtype == before.dtype
      assert not leaf.weak_type


@every_species
def test_the_key_decides(name):
  key, other = jax.random.key(0), jax.random.key(1)
  once, again = searched(name), search(name, key, key)
  jax.tree.map(np.testing.assert_array_equal, once, again)
  # The start is the same, so that it is `ask` that has another key.
  different = search(name, key, other)
  assert (once.asked[0] != different.asked[0]).any()


@every_species
def test_the_first_offspring_are_diverse(name):
  for seed in range(3):
    first = searched(name, seed).asked[0]
    few = 4 if name in INFORMED else PLACES // 2
    assert len(np.unique(first, axis=0)) >= few


@every_species
def test_whatever_is_allowed_is_tried_in_the_end(name):
  tried = np.zeros((NODES, CHOICES), bool)
  for seed in range(3):
    for asked in searched(name, seed).asked.reshape(-1, NODES):
      tried[np.arange(NODES), asked] = True
  expected = np.asarray(PROBLEM.allowed).copy()
  if name == 'floor':
    # The highest choice is one point of its range: biased to compression.
    tried[:, -1] = expected[:, -1]
  np.testing.assert_array_equal(tried, expected)


@with_genotypes
def test_genotypes_come_from_where_the_feedback_says(name):
  state = jax.tree.map(lambda x: x[-1], searched(name).private)
  rng = np.random.default_rng(0)
  own = np.arange(PLACES) % 3 > 0
  asked = searched(name).asked.shape[1]
  source = rng.integers(0, PLACES + asked, PLACES)
  source[:4] %= PLACES
  told = find(name).tell(
    jax.random.key(3), state, some_feedback(PLACES, own, source, asked)
  )
  # Every state begins with the genotypes of the parents and the offspring.
  old, new, *_ = state
  assert (source[own] < PLACES).any()
  assert (source[own] >= PLACES).any()

  def follows(old, new, now):
    both = np.concatenate([old, new])
    np.testing.assert_array_equal(now[own], both[source][own])

  jax.tree.map(follows, old, new, told[0])


def by_rounding(rounding, genotypes):
  whole = rounding(genotypes).astype(jnp.int32)
  return variation.nearest_allowed(whole, PROBLEM.allowed)


def by_network(network, genotypes):
  policy = neuroevolution.most_likely(PROBLEM, network)
  graph = policies.undirected(PROBLEM.graph)
  weights = jax.vmap(neuroevolution.unravel(policy))(genotypes)
  logits = jax.vmap(lambda w: network.apply(w, graph))(weights)
  return jnp.argmax(jnp.where(PROBLEM.allowed, logits, -jnp.inf), axis=-1)


def by_prices(genotypes):
  known = PROBLEM.prior
  solve = functools.partial(prior_lib.cheapest, known, PROBLEM.allowed)
  hops = prior_lib.rounds(known)
  return jax.vmap(lambda p, f: solve(jnp.exp(p), jnp.exp(f), hops))(*genotypes)


# From the genotypes of a species to choices. A Boltzmann chromosome is not
# among them: it is a distribution.
EXPRESSED = {
  'direct': functools.partial(by_rounding, jnp.round),
  'floor': functools.partial(by_rounding, jnp.floor),
  'gcn': functools.partial(by_network, policies.GCN(CHOICES)),
  'graph_unet': functools.partial(by_network, policies.GraphUNet(CHOICES)),
  'lagrangian': by_prices,
}


@named(EXPRESSED)
def test_survivors_are_what_their_genotypes_say(name):
  genotypes, *_ = searched(name).private
  express = quickly(jax.vmap(EXPRESSED[name]))
  choices = searched(name).population.choices
  np.testing.assert_array_equal(express(genotypes), choices)


# The search.


@every_species
def test_a_species_alone_is_a_whole_search(name):
  front = jnp.asarray(brute_force_front(PROBLEM))
  best = float(progress.hypervolume(PROBLEM, front))
  # What is rounded down is at the highest choice in one point alone, and no
  # price is paid for overflow.
  low = {'floor': 0.6, 'lagrangian': 0.7, 'priced_gcn': 0.7}
  enough = low.get(name, 0.8)
  for seed in range(3):
    first, last = searched(name, seed).hypervolume[[0, -1]]
    assert first < last
    assert enough * best < last < 1.0001 * best


@pytest.mark.slow
def test_floor_never_chooses_above_direct():
  lower = 0
  for seed in range(3):
    # From the same key, and thus the same random vectors.
    direct, floor = (
      searched(name, seed).asked[0] for name in ('direct', 'floor')
    )
    assert (floor <= direct).all()
    lower += (floor < direct).sum()
  assert lower > 0
