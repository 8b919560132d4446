"""SSNE as an evosax algorithm, and its operators tensor by tensor."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evosax.algorithms.population_based.base import PopulationBasedAlgorithm

from nemo_jax.search import blocks
from nemo_jax.search.ssne import SSNE

SOLUTION = {
  'bias': np.zeros(7, np.float32),
  'kernel': np.zeros((5, 3), np.float32),
  'logit': np.zeros((2, 2), np.float32),
}
WEIGHTS = 26


def random_population(size, seed=0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: rng.normal(size=(size, *x.shape)).astype(np.float32), SOLUTION
  )


@functools.cache
def make(size):
  return SSNE(population_size=size, solution=SOLUTION)


def params(mut_dist, cr_dist, std=0.3):
  return dataclasses.replace(
    make(16).default_params, mut_dist=mut_dist, cr_dist=cr_dist, std=std
  )


def children(parents, fitness, rates, seed=0):
  """One `ask` by evosax's own protocol, which compiles it."""
  algorithm = make(len(fitness))
  key_init, key_ask = jax.random.split(jax.random.key(seed))
  state = algorithm.init(key_init, parents, jnp.asarray(fitness), rates)
  asked, _ = algorithm.ask(key_ask, state, rates)
  return jax.tree.map(np.asarray, asked)


def flat(population):
  """[P, D], in evosax's order."""
  leaves = jax.tree.leaves(population)
  return np.concatenate([x.reshape(len(x), -1) for x in leaves], axis=1)


def level(size):
  """A fitness that prefers nobody."""
  return np.zeros(size, np.float32)


# The protocol.


def test_it_speaks_the_protocol_of_evosax():
  algorithm = make(16)
  assert isinstance(algorithm, PopulationBasedAlgorithm)
  assert algorithm.num_dims == WEIGHTS
  rates = algorithm.default_params
  population = random_population(16)
  fitness = np.arange(16, dtype=np.float32)[::-1]
  state = algorithm.init(jax.random.key(0), population, fitness, rates)
  asked, state = algorithm.ask(jax.random.key(1), state, rates)
  assert jax.tree.map(jnp.shape, asked) == jax.tree.map(jnp.shape, population)
  told, metrics = algorithm.tell(
    jax.random.key(2), asked, fitness, state, rates
  )
  assert jax.tree.structure(told) == jax.tree.structure(state)
  np.testing.assert_array_equal(told.population, flat(asked))
  np.testing.assert_array_equal(told.fitness, fitness)
  assert int(told.generation_counter) == 1
  assert float(metrics['best_fitness']) == 0


def test_the_same_key_asks_the_same():
  population, rates = random_population(16), params(0.5, 0.3)
  one = flat(children(population, level(16), rates, seed=1))
  two = flat(children(population, level(16), rates, seed=1))
  other = flat(children(population, level(16), rates, seed=2))
  np.testing.assert_array_equal(one, two)
  assert (one != other).any()


def test_sphere_improves():
  algorithm, rates = make(16), make(16).default_params
  sphere = lambda x: jnp.sum((x - 1) ** 2, axis=-1)

  def generation(state, key):
    key_ask, key_tell = jax.random.split(key)
    asked, state = algorithm.ask(key_ask, state, rates)
    # As in NEMO, the best of parents and children live on.
    rows = jax.vmap(algorithm._ravel_solution)(asked)
    both = jnp.concatenate([state.population, rows])
    best = jnp.argsort(sphere(both))[:16]
    kept = jax.vmap(algorithm._unravel_solution)(both[best])
    state, _ = algorithm.tell(key_tell, kept, sphere(both)[best], state, rates)
    return state, jnp.min(state.fitness)

  @jax.jit
  def run(key):
    population = random_population(16)
    state = algorithm.init(key, population, sphere(flat(population)), rates)
    before = jnp.min(state.fitness)
    _, best = jax.lax.scan(generation, state, jax.random.split(key, 150))
    return before, best

  before, best = run(jax.random.key(0))
  assert (np.diff(best) <= 0).all()
  assert best[-1] < before / 10


# Mutation.


def changed_tensors(rates, size=512):
  """bool[P, T]: which tensors differ from the one parent; all or nothing."""
  parent = random_population(1)
  population = jax.tree.map(lambda x: np.repeat(x, size, axis=0), parent)
  asked = children(population, level(size), rates)
  changed = []
  for before, after in zip(
    jax.tree.leaves(population), jax.tree.leaves(asked), strict=True
  ):
    differs = (before != after).reshape(size, -1)
    # A whole tensor moves or stays: noise of zero does not happen.
    assert (differs.all(1) | ~differs.any(1)).all()
    changed.append(differs.all(1))
  return np.stack(changed, axis=1)


def test_every_tensor_changes_at_rate_one():
  assert changed_tensors(params(1.0, 0.0)).all()


def test_nothing_changes_at_rate_zero():
  assert not changed_tensors(params(0.0, 0.0)).any()


def test_tensors_change_at_their_rate_independently():
  changed = changed_tensors(params(0.5, 0.0))
  four_sigma = 4 * np.sqrt(0.25 / len(changed))
  np.testing.assert_allclose(changed.mean(0), 0.5, rtol=0, atol=four_sigma)
  # All eight combinations of three tensors are as frequent as one another.
  combinations = np.bincount(changed @ [1, 2, 4], minlength=8) / len(changed)
  four_sigma = 4 * np.sqrt(1 / 8 * 7 / 8 / len(changed))
  np.testing.assert_allclose(combinations, 1 / 8, rtol=0, atol=four_sigma)


def test_noise_is_in_units_of_the_spread_of_its_tensor():
  size = 512
  spread = {'bias': 0.0, 'kernel': 5.0, 'logit': 0.5}
  population = {
    name: np.full((size, *x.shape), spread[name], np.float32)
    for name, x in SOLUTION.items()
  }
  asked = children(population, level(size), params(1.0, 0.0, std=0.3))
  expected = {'bias': 0.1, 'kernel': 5.0, 'logit': 0.5}
  for name, scale in expected.items():
    noise = (asked[name] - population[name]).ravel()
    np.testing.assert_allclose(noise.std(), 0.3 * scale, rtol=0.1)
    assert abs(noise.mean()) < 4 * 0.3 * scale / np.sqrt(noise.size)


# Selection and crossover.


def test_without_variation_children_are_copies_of_parents():
  population = random_population(16)
  parents = flat(population)
  asked = flat(children(population, level(16), params(0.0, 0.0)))
  assert (asked[:, None] == parents[None]).all(-1).any(1).all()


def test_the_better_parents_have_the_more_children():
  size = 512
  population = random_population(size)
  fitness = np.arange(size, dtype=np.float32)
  asked = flat(children(population, fitness, params(0.0, 0.0)))
  parents = flat(population)
  place = {row.tobytes(): i for i, row in enumerate(parents)}
  picked = np.array([place[row.tobytes()] for row in asked])
  # The better of two: its place is a third of the way down on average.
  deviation = size / np.sqrt(18) / np.sqrt(size)
  assert abs(picked.mean() - size / 3) < 4 * deviation


@pytest.mark.parametrize('rate', [1.0, 0.3])
def test_each_weight_comes_from_one_of_two_parents(rate):
  size = 512
  # Every weight tells whose it is.
  population = jax.tree.map(
    lambda x: np.broadcast_to(
      np.arange(size, dtype=np.float32).reshape(-1, *[1] * x.ndim),
      (size, *x.shape),
    ),
    SOLUTION,
  )
  asked = children(population, level(size), params(0.0, rate))
  owners = flat(asked)
  assert (owners == np.round(owners)).all()
  parents = [np.unique(row) for row in owners]
  counts = np.array([len(found) for found in parents])
  assert counts.max() == 2
  # The mate gives half of each crossed tensor; it is seldom the same parent.
  mixed = np.stack(
    [
      (x.reshape(size, -1) != x.reshape(size, -1)[:, :1]).any(1)
      for x in jax.tree.leaves(asked)
    ],
    axis=1,
  )
  weights = np.array([x[0].size for x in jax.tree.leaves(asked)])
  share = rate * (1 - 1 / size) * (1 - 2.0 ** (1 - weights))
  four_sigma = 4 * np.sqrt(np.maximum(share * (1 - share), 1e-3) / size)
  assert (abs(mixed.mean(0) - share) < four_sigma).all()


def test_children_that_are_not_wanted_are_copies():
  size = 3 * blocks.NETWORKS
  rates = params(1.0, 0.0).replace(wanted=1)
  asked = flat(children(random_population(size), level(size), rates))
  made = asked[: blocks.NETWORKS]
  assert len(np.unique(made, axis=0)) == blocks.NETWORKS
  np.testing.assert_array_equal(
    asked[blocks.NETWORKS :],
    np.broadcast_to(asked[0], (2 * len(made), WEIGHTS)),
  )
