"""Species of networks under evosax's algorithms, on a placement problem."""

import functools

import evosax.algorithms
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemo_jax import pareto
from nemo_jax.core.types import InputError
from nemo_jax.search import neuroevolution, policies
from nemo_jax.search.problem import Feedback
from tests.search import alone
from tests.search.alone import PLACES
from tests.search.compiling import quickly
from tests.search.feedbacks import PROBLEM

GENERATIONS = 3
NETWORK = policies.GCN(num_choices=3, hidden=4)
GRAPH = policies.undirected(PROBLEM.graph)
POLICY = neuroevolution.most_likely(PROBLEM, NETWORK)


def later(*names):
  return [pytest.param(name, marks=pytest.mark.slow) for name in names]


@quickly
def logits_of(members):
  """float32[P, N, K]: logits of every network, by its own definition."""
  weights = jax.vmap(neuroevolution.unravel(POLICY))(members)
  logits = jax.vmap(lambda w: NETWORK.apply(w, GRAPH))(weights)
  return jnp.where(PROBLEM.allowed, logits, -jnp.inf)


def finite(tree):
  return all(jnp.isfinite(x).all() for x in jax.tree.leaves(tree))


@functools.cache
def make(name, places=PLACES):
  one = neuroevolution.make(POLICY, places, name, proposals=places)
  return alone.compiled(one)


@functools.cache
def searched(name, generations):
  key = jax.random.key(0)
  return alone.search(make(name), key, key, generations)


def last_of(name):
  """The population and the private state at the end of a search."""
  found = searched(name, GENERATIONS)
  return jax.tree.map(lambda x: x[-1], (found.population, found.private))


def check(name, generations):
  found = searched(name, generations)
  assert make(name).ask._cache_size() == 1
  assert make(name).tell._cache_size() == 1
  assert np.isfinite(found.hypervolume).all()
  assert (found.failures == 0).all()
  assert finite(found.private.members)
  assert finite(found.private.asked)
  # Every place, of a survivor or of a spare, has the network behind it. A
  # choice that is forbidden is worth -inf.
  for members, choices in zip(
    found.private.members, found.population.choices, strict=True
  ):
    logits = np.asarray(logits_of(members))
    taken = np.take_along_axis(logits, choices[..., None], axis=-1)[..., 0]
    # No more than rounding can lie between two compiled programs.
    assert (taken >= logits.max(-1) - 1e-4).all()


@pytest.mark.parametrize(
  'name', ['SSNE', 'SNES', *later('SimpleGA', 'Open_ES')]
)
def test_three_generations(name):
  check(name, GENERATIONS)


@pytest.mark.slow
@pytest.mark.parametrize('name', neuroevolution.algorithms())
def test_every_algorithm_searches(name):
  check(name, 15)
  # It does not ask the same for ever.
  asked = searched(name, 15).private.asked
  first, last = (logits_of(asked[i]) for i in (0, -1))
  assert not np.array_equal(first.argmax(-1), last.argmax(-1))


@pytest.mark.parametrize('name', neuroevolution.algorithms())
def test_every_algorithm_can_be_made(name):
  make(name)


@pytest.mark.parametrize('name', ['SSNE', 'SNES'])
def test_more_may_be_proposed_than_there_are_places(name):
  one = neuroevolution.make(POLICY, PLACES, name, proposals=40)
  one = alone.compiled(one)
  key = jax.random.key(0)
  state = one.init(key)
  choices, state = one.ask(key, state)
  assert len(choices) == len(state.asked) == 40
  assert len(state.members) == PLACES
  fitness = np.full(40, np.inf)
  fitness[[3, 33]] = [0, 1]
  population = pareto.empty_population(PLACES, *PROBLEM.allowed.shape[:1], 3)
  source = np.arange(PLACES).clip(2)
  source[:2] = PLACES + 3, PLACES + 33
  told = one.tell(
    key,
    state,
    Feedback(
      population=population,
      rank=jnp.arange(PLACES, dtype=jnp.float32),
      own=jnp.ones(PLACES, bool),
      source=jnp.asarray(source, jnp.int32),
      fitness=jnp.asarray(fitness, jnp.float32),
      learned=None,
    ),
  )
  taken = state.asked[jnp.array([3, 33])]
  np.testing.assert_array_equal(told.members[:2], taken)
  assert finite(told.algorithm)


# What is refused.


def test_only_what_a_population_size_is_enough_for_is_offered():
  offered = neuroevolution.algorithms()
  left_out = evosax.algorithms.algorithms.keys() - offered.keys()
  assert left_out == {'RandomSearch', 'SV_CMA_ES', 'SV_Open_ES'}
  assert 'SSNE' in offered


def test_an_unknown_algorithm_lists_the_known():
  with pytest.raises(InputError) as caught:
    neuroevolution.make(POLICY, PLACES, 'Nonsense')
  message = str(caught.value)
  assert 'Nonsense' in message
  assert '\n' not in message
  assert all(name in message for name in neuroevolution.algorithms())


# All that are built on pairs.
@pytest.mark.parametrize(
  'name',
  ['ARS', 'ASEBO', 'CR_FM_NES', 'GuidedES', 'Open_ES', 'PGPE', 'PersistentES'],
)
def test_an_odd_population_is_refused_where_pairs_are_needed(name):
  with pytest.raises(InputError, match=f'^{name}: .*even') as caught:
    make(name, 15)
  assert '\n' not in str(caught.value)


def test_an_odd_population_is_fine_elsewhere():
  assert callable(make('SNES', 15).ask)


# What algorithms are told.


def feedback(population, own=None, fitness=None):
  """A feedback on the population as it is, every parent in its place."""
  everyone = jnp.ones(PLACES, bool)
  own = everyone if own is None else jnp.asarray(own)
  unknown = jnp.full(PLACES, jnp.inf, jnp.float32)
  return Feedback(
    population=population,
    rank=jnp.arange(PLACES, dtype=jnp.float32)[::-1],
    own=own,
    source=jnp.arange(PLACES, dtype=jnp.int32),
    fitness=unknown if fitness is None else jnp.asarray(fitness, jnp.float32),
    learned=None,
  )


@pytest.mark.parametrize('name', ['SNES', *later('Open_ES')])
def test_a_distribution_stays_when_nothing_was_evaluated(name):
  population, before = last_of(name)
  key = jax.random.key(2)
  told = make(name).tell(key, before, feedback(population))
  jax.tree.map(np.testing.assert_array_equal, told.algorithm, before.algorithm)
  fitness = np.full(PLACES, np.inf)
  fitness[:4] = [3, 1, 0, 2]
  told = make(name).tell(key, before, feedback(population, fitness=fitness))
  assert not np.array_equal(told.algorithm.mean, before.algorithm.mean)
  assert finite(told.algorithm.mean)


@pytest.mark.parametrize('name', ['HillClimbing', 'GradientlessDescent'])
def test_the_best_of_an_earlier_generation_does_not_block_the_next(name):
  population, _ = last_of('SNES')
  private = make(name).init(jax.random.key(0))
  for generation in range(2):
    # Fitness is a rank, so that the best of every generation has the same.
    ranks = np.roll(np.arange(PLACES), generation)
    given = feedback(population, fitness=ranks)
    private = make(name).tell(jax.random.key(1), private, given)
    np.testing.assert_array_equal(
      private.algorithm.mean, private.asked[generation]
    )


@pytest.mark.parametrize('own', [1, 5, PLACES])
def test_survivors_fill_the_population_of_an_algorithm_best_first(own):
  population, private = last_of('SSNE')
  rows = np.arange(PLACES) < own
  told = make('SSNE').tell(
    jax.random.key(2), private, feedback(population, own=rows)
  )
  # The rank of `feedback` falls from row to row.
  best_first = np.arange(own)[::-1]
  expected = best_first[np.arange(PLACES) % own]
  np.testing.assert_array_equal(
    told.algorithm.population, told.members[expected]
  )
  ranks = np.arange(PLACES)[::-1]
  np.testing.assert_array_equal(told.algorithm.fitness, ranks[expected])


def test_survivors_without_rank_are_the_worst():
  population, private = last_of('SSNE')
  given = feedback(population)
  given = given._replace(rank=given.rank.at[3].set(jnp.inf))
  told = make('SSNE').tell(jax.random.key(2), private, given)
  assert jnp.isfinite(told.algorithm.fitness).all()
  assert int(jnp.argmax(told.algorithm.fitness)) == PLACES - 1
