"""What every species keeps to, and how they are found by name."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemo_jax import pareto
from nemo_jax.core.types import Array, InputError
from nemo_jax.search import (
  blocks,
  nemo,
  neuroevolution,
  policies,
  species,
  surrogate,
  variation,
)
from nemo_jax.search import prior as prior_lib
from nemo_jax.search.problem import Feedback, Population, Species
from tests.placement import brute_force_front, placement_problem

PLACES, GENERATIONS = 16, 15
# Screening is tested elsewhere, and takes long to compile.
PROBLEM = placement_problem(7).replace(costs=None)
NODES, CHOICES = PROBLEM.allowed.shape
# What takes time here is to compile.
quickly = functools.partial(
  jax.jit, compiler_options={'xla_backend_optimization_level': 0}
)


def overheard(one: Species) -> Species:
  """The same species; its state is a pair, the second all that it asked."""

  def init(key):
    private = one.init(key)
    asked, _ = jax.eval_shape(one.ask, key, private)
    return private, jnp.zeros(asked.shape, asked.dtype)

  def ask(key, state):
    choices, private = one.ask(key, state[0])
    return choices, (private, choices)

  def tell(key, state, feedback):
    return one.tell(key, state[0], feedback), state[1]

  return Species(init, ask, tell)


class Search(NamedTuple):
  """A search with one species alone; all begins with the generations."""

  population: Population
  private: Any  # the state of the species
  asked: Array  # [generations, Q, N]
  hypervolume: Array


@functools.cache
def search(name):
  """Jitted: the keys of the start and of the run to a whole `Search`."""
  team = (overheard(species.find(name)(PROBLEM, PLACES)),)

  @quickly
  def run(start, key):
    def generation(state, _):
      state, metrics = nemo.step(key, state, PROBLEM, team)
      [(private, asked)] = state.species
      volume = metrics['hypervolume']
      return state, Search(state.population, private, asked, volume)

    state = nemo.init(start, PROBLEM, team, PLACES, archive_size=64)
    return jax.lax.scan(generation, state, None, length=GENERATIONS)[1]

  return run


@functools.cache
def searched(name, seed=0):
  key = jax.random.key(seed)
  return jax.tree.map(np.asarray, search(name)(key, key))


# They begin with the front of the estimate, which has few points here.
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


def some_feedback(own=None, source=None, asked=PLACES, places=PLACES):
  everyone = np.ones(places, bool)
  rank = jnp.arange(places, dtype=jnp.float32)
  return Feedback(
    population=Population(
      choices=jnp.ones((places, NODES), jnp.int32),
      objectives=jnp.ones((places, 3), jnp.float32),
      species=jnp.zeros(places, jnp.int32),
    ),
    rank=rank,
    own=jnp.asarray(everyone if own is None else own),
    source=jnp.asarray(
      np.arange(places) if source is None else source, jnp.int32
    ),
    fitness=jnp.arange(asked, dtype=jnp.float32),
    learned=surrogate.learn(
      PROBLEM, pareto.empty_population(surrogate.MEMORY, NODES, 3)
    ),
  )


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
  feedback = jax.eval_shape(lambda: some_feedback(asked=len(choices)))
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


MANY = 400


@pytest.mark.parametrize(
  'name',
  [
    name
    if name in ('direct', 'gcn', 'thompson')
    else pytest.param(name, marks=pytest.mark.slow)
    for name in species.names()
  ],
)
def test_of_many_places_a_species_fills_about_its_own(name):
  one = species.find(name)(PROBLEM, MANY)
  ask, tell = quickly(one.ask), quickly(one.tell)
  keys = jax.random.split(jax.random.key(0), 4)
  first, state = ask(keys[0], quickly(one.init)(keys[1]))
  assert len(first) >= MANY
  # At first it may have all places.
  assert (first[-1] != first[0]).any() or (first[-2] != first[0]).any()
  own = jnp.arange(MANY) < 20
  feedback = some_feedback(own, asked=len(first), places=MANY)
  then, _ = ask(keys[2], tell(keys[3], state, feedback))
  made = 2 * blocks.BLOCK
  np.testing.assert_array_equal(
    then[made:], np.broadcast_to(then[0], then[made:].shape)
  )
  assert np.asarray(PROBLEM.allowed)[np.arange(NODES), then].all()


@every_species
def test_the_key_decides(name):
  key, other = jax.random.key(0), jax.random.key(1)
  once, again = searched(name), search(name)(key, key)
  jax.tree.map(np.testing.assert_array_equal, once, again)
  # The start is the same, so that it is `ask` that has another key.
  different = search(name)(key, other)
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
  one = species.find(name)(PROBLEM, PLACES)
  state = jax.tree.map(lambda x: x[-1], searched(name).private)
  rng = np.random.default_rng(0)
  own = np.arange(PLACES) % 3 > 0
  asked = searched(name).asked.shape[1]
  source = rng.integers(0, PLACES + asked, PLACES)
  source[:4] %= PLACES
  tell = quickly(one.tell)
  told = tell(jax.random.key(3), state, some_feedback(own, source, asked))
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
  best = float(nemo.hypervolume(PROBLEM, front))
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


# Names.


def test_an_unknown_species_lists_the_known():
  with pytest.raises(InputError, match='nonsense') as caught:
    species.find('nonsense')
  message = str(caught.value)
  assert '\n' not in message
  assert all(name in message for name in species.names())


@pytest.mark.parametrize(
  ('name', 'words'),
  [
    ('direct:SNES', ['direct', 'no choice of algorithm']),
    ('gcn:Nonsense', ['Nonsense', 'SNES', 'SSNE']),
    ('', ['direct', 'gcn']),
    (':SNES', ['direct', 'gcn']),
  ],
)
def test_what_cannot_be_found_is_said_in_one_line(name, words):
  with pytest.raises(InputError) as caught:
    species.find(name)
  message = str(caught.value)
  assert '\n' not in message
  assert all(word in message for word in words)


@pytest.mark.parametrize('name', ['direct', 'lagrangian', 'thompson'])
def test_a_species_has_more_for_a_surrogate_to_choose_from(name):
  one = species.find(name)(PROBLEM, MANY)
  tell = quickly(one.tell)
  first, state = quickly(one.ask)(
    jax.random.key(0), one.init(jax.random.key(1))
  )
  # 220 places: two blocks of a hundred rows do not hold twice as many.
  feedback = some_feedback(
    jnp.arange(MANY) < 220, asked=len(first), places=MANY
  )
  state = tell(jax.random.key(2), state, feedback)
  made = []
  for ask in (one.ask, one.ask_more):
    rows = np.asarray(quickly(ask)(jax.random.key(3), state)[0])
    # What was not made is a copy of the first row.
    copies = (rows[::-1] == rows[0]).all(axis=1)
    made.append(len(rows) - np.argmin(copies))
  assert 220 <= made[0] < made[1]


@pytest.mark.parametrize(
  ('words', 'blind'),
  [
    (['paper'], True),
    (['paper', 'boltzmann'], True),
    (['direct'], False),
    (['nemo'], False),
  ],
)
def test_a_team_with_the_papers_is_blind(words, blind):
  species.team(words)
  assert species.is_blind(words) == blind


@pytest.mark.parametrize('other', ['thompson', 'lagrangian', 'priced_gcn:SNES'])
@pytest.mark.parametrize('first', [True, False])
def test_the_papers_team_is_refused_beside_what_needs_sensitivities(
  other, first
):
  words = ['paper', other] if first else [other, 'paper']
  with pytest.raises(InputError, match=f'without sensit.*{other}') as caught:
    species.team(words)
  assert '\n' not in str(caught.value)


def test_an_algorithm_stands_behind_the_colon():
  one = species.find('gcn:SNES')(PROBLEM, PLACES)
  state = jax.eval_shape(one.init, jax.random.key(0))
  # SNES keeps a distribution, SSNE a population.
  assert hasattr(state.algorithm, 'std')
  assert not hasattr(state.algorithm, 'population')
  choices, _ = jax.eval_shape(one.ask, jax.random.key(0), state)
  assert choices.shape[1:] == (NODES,)
