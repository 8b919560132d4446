"""Species whose genotype is the weights of a graph neural network."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import evosax.algorithms as evosax_algorithms
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from evosax.algorithms.population_based.base import PopulationBasedAlgorithm
from jax import flatten_util

from nemo_jax.core.types import Array, InputError, PyTree
from nemo_jax.search import blocks, policies, variation
from nemo_jax.search.problem import Feedback, Problem, Species
from nemo_jax.search.ssne import SSNE


class State(NamedTuple):
  """Networks run parallel to the population; and the algorithm's own state."""

  members: Array  # weights, [P, D]; see `unravel`
  asked: Array  # [Q, D]
  algorithm: Any
  places: Array  # int32[], of the population, that are this species' own


def _needs_more(algorithm: type) -> bool:
  """Whether it takes arguments beside population size and solution."""
  parameters = inspect.signature(algorithm).parameters.values()
  needed = {p.name for p in parameters if p.default is p.empty}
  return bool(needed - {'population_size', 'solution'})


def algorithms() -> dict[str, type]:
  """Every algorithm that can evolve the weights, by name.

  SSNE, and those of evosax that need no more than a population size; left out
  are random search, which wants a sampler, and the Stein-variational ones,
  which want a number of populations.
  """
  known = {'SSNE': SSNE} | evosax_algorithms.algorithms
  return {name: a for name, a in known.items() if not _needs_more(a)}


def check_algorithm(name: str) -> None:
  """Raises `InputError` unless `algorithms` has the name."""
  known = sorted(algorithms())
  if name not in known:
    raise InputError(
      f'unknown algorithm {name!r}; the choices are {", ".join(known)}'
    )


def _build(name: str, population_size: int, weights: PyTree):
  """The algorithm, for weights as vectors [D]."""
  check_algorithm(name)
  build = algorithms()[name]
  sizes = [leaf.size for leaf in jax.tree.leaves(weights)]
  if build is SSNE:
    build = functools.partial(build, sizes=sizes)
  try:
    return build(
      population_size=population_size, solution=np.zeros(sum(sizes), np.float32)
    )
  except AssertionError as error:
    # evosax states what an algorithm asks of the population as assertions.
    raise InputError(f'{name}: {error}') from error


def _forget_best(inner):
  """The state without the best fitness so far.

  Fitness is a rank within one generation, so that of an earlier one cannot be
  compared; a rank of 0 would never be beaten.
  """
  names = [field.name for field in dataclasses.fields(inner)]
  forgotten = [name for name in names if name.startswith('best_fitness')]
  return inner.replace(
    **{n: jnp.full_like(getattr(inner, n), jnp.inf) for n in forgotten}
  )


def _tell_population(algorithm, key, state, feedback, params):
  """For algorithms that keep a population of their own.

  They are told what came of their proposals, for the sake of what they adapt,
  which in SSNE is nothing; where a proposal was not evaluated its parent comes
  back. Then NEMO's survivors take the place of the population, repeated until
  it is full.
  """
  inner = state.algorithm
  if not isinstance(algorithm, SSNE):
    inner = _forget_best(inner)
    skipped = ~jnp.isfinite(feedback.fitness)
    told = jnp.where(skipped[:, None], inner.population, state.asked)
    worst = jnp.where(jnp.isfinite(inner.fitness), inner.fitness, 1e9)
    fitness = jnp.where(skipped, worst, feedback.fitness)
    inner, _ = algorithm.tell(key, told, fitness, inner, params)

  rank = jnp.where(feedback.own, feedback.rank, jnp.inf)
  order = jnp.lexsort((rank, ~feedback.own))
  count = jnp.maximum(jnp.sum(feedback.own), 1)
  repeated = order[jnp.arange(len(feedback.fitness)) % count]
  members = _survivors(state, feedback)
  fitness = jnp.where(jnp.isfinite(rank), rank, 1e9)[repeated]
  inner = inner.replace(population=members[repeated], fitness=fitness)
  return state._replace(members=members, algorithm=inner)


def _tell_distribution(algorithm, key, state, feedback, params):
  """For algorithms that keep a distribution.

  A proposal that was not evaluated is told with the median fitness, which a
  distribution neither approaches nor leaves; without any evaluation nothing
  is told.
  """
  evaluated = jnp.isfinite(feedback.fitness)
  median = jnp.nanmedian(jnp.where(evaluated, feedback.fitness, jnp.nan))
  fitness = jnp.where(evaluated, feedback.fitness, median)
  inner = _forget_best(state.algorithm)
  inner, _ = algorithm.tell(key, state.asked, fitness, inner, params)
  inner = jax.tree.map(
    lambda new, old: jnp.where(jnp.any(evaluated), new, old),
    inner,
    state.algorithm,
  )
  return state._replace(members=_survivors(state, feedback), algorithm=inner)


def _survivors(state: State, feedback: Feedback) -> Array:
  """The networks that live on, in the rows of the population."""
  return variation.survivors(state.members, state.asked, feedback.source)


class Policy(NamedTuple):
  """A way from weights to a solution."""

  start: Callable[[Array], PyTree]  # (key) -> weights, at random
  choose: Callable[[PyTree], Array]  # weights -> choices [N] int32


def _blank(policy: Policy) -> PyTree:
  """Weights, all zero."""
  weights = jax.eval_shape(policy.start, jax.random.key(0))
  return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), weights)


def unravel(policy: Policy) -> Callable[[Array], PyTree]:
  """From the vector [D] that a species keeps of weights to the weights."""
  return flatten_util.ravel_pytree(_blank(policy))[1]


def most_likely(problem: Problem, network: nn.Module) -> Policy:
  """The most likely allowed choice of each node.

  Args:
    problem: what is searched; its graph is what the network reads.
    network: a module from a graph to logits [N, K].
  """
  graph = policies.undirected(jax.device_get(problem.graph))

  def choose(weights):
    logits = jnp.asarray(network.apply(weights, graph))
    logits = jnp.where(problem.allowed, logits, -jnp.inf)
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)

  start = lambda key: network.init(key, graph)
  return Policy(start, choose)


def make(
  policy: Policy,
  population_size: int,
  algorithm: str = 'SSNE',
  proposals: int = 64,
) -> Species:
  """A species of weights, evolved by SSNE or by any evosax algorithm.

  Args:
    policy: what the weights decide.
    population_size: P.
    algorithm: one of `algorithms()`.
    proposals: Q, how many networks it makes; P if that is more.

  Raises:
    InputError: the algorithm is unknown, or not for this many networks.
  """
  start = lambda key: flatten_util.ravel_pytree(policy.start(key))[0]
  to_weights = unravel(policy)
  number, size = blocks.divide(max(population_size, proposals), blocks.NETWORKS)
  count = number * size
  evolver = _build(algorithm, count, _blank(policy))
  params = evolver.default_params
  has_population = isinstance(evolver, PopulationBasedAlgorithm)
  tell_one = _tell_population if has_population else _tell_distribution

  def init(key):
    keys = jax.random.split(key, count + 1)
    asked = jax.vmap(start)(keys[1:])
    if has_population:
      unknown = jnp.full(count, 1e9, jnp.float32)
      inner = evolver.init(keys[0], asked, unknown, params)
    else:
      inner = evolver.init(keys[0], asked[0], params)
    # evosax leaves weakly typed numbers behind, which would be traced twice.
    inner = jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), inner)
    places = jnp.int32(population_size)
    return State(asked[:population_size], asked, inner, places)

  def ask(key, state):
    wanted = blocks.num_proposals(state.places)
    # Of other algorithms all children are made, which takes less than to see
    # what they decide.
    lazy = {'wanted': wanted} if isinstance(evolver, SSNE) else {}
    asked, inner = evolver.ask(key, state.algorithm, params.replace(**lazy))
    choices = blocks.fill(
      jax.vmap(lambda vector: policy.choose(to_weights(vector))),
      asked.reshape(number, size, -1),
      wanted,
    )
    return choices, state._replace(asked=asked, algorithm=inner)

  def tell(key, state, feedback):
    told = tell_one(evolver, key, state, feedback, params)
    return told._replace(places=jnp.sum(feedback.own, dtype=jnp.int32))

  return Species(init, ask, tell)
