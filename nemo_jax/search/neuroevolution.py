"""Species whose genotypes are the weights of graph neural networks."""

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
from jaxtyping import Float, Int

from nemo_jax.core.types import Array, InputError, PyTree
from nemo_jax.search import blocks, policies, variation
from nemo_jax.search.problem import Feedback, Problem, Species
from nemo_jax.search.ssne import SSNE


class State(NamedTuple):
  """Weights of the networks, as vectors of length D; see `unravel`."""

  members: Float[Array, 'P D']  # one network for each row of the population
  asked: Float[Array, 'Q D']  # the last proposals
  algorithm: Any  # state of the evolutionary algorithm
  places: Int[Array, '']  # int32, rows of the population of this species


def _needs_more(algorithm: type) -> bool:
  """Whether it needs arguments other than population size and solution."""
  parameters = inspect.signature(algorithm).parameters.values()
  needed = {p.name for p in parameters if p.default is p.empty}
  return bool(needed - {'population_size', 'solution'})


def algorithms() -> dict[str, type]:
  """Algorithms that can evolve the weights, by name.

  SSNE, and those of evosax that need only a population size. Random search is
  left out because it needs a sampler, and the Stein-variational algorithms
  because they need a number of populations.
  """
  known = {'SSNE': SSNE} | evosax_algorithms.algorithms
  return {name: a for name, a in known.items() if not _needs_more(a)}


def check_algorithm(name: str) -> None:
  """Raises `InputError` unless the name is one of `algorithms`."""
  known = sorted(algorithms())
  if name not in known:
    raise InputError(
      f'unknown algorithm {name!r}; the choices are {", ".join(known)}'
    )


def _build(name: str, population_size: int, weights: PyTree) -> Any:
  """The algorithm, an instance for weights as vectors [D]."""
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
    # evosax checks the population size of an algorithm by assertions.
    raise InputError(f'{name}: {error}') from error


def _forget_best(inner: Any) -> Any:
  """State of an algorithm with the best fitness so far reset to +inf.

  Fitness is the rank within one generation, so ranks of different generations
  cannot be compared; a rank of 0 would stay the best for ever.
  """
  names = [field.name for field in dataclasses.fields(inner)]
  forgotten = [name for name in names if name.startswith('best_fitness')]
  return inner.replace(
    **{n: jnp.full_like(getattr(inner, n), jnp.inf) for n in forgotten}
  )


def _tell_population(
  algorithm: Any, key: Array, state: State, feedback: Feedback, params: Any
) -> State:
  """Next state with an algorithm that keeps a population of its own.

  First `tell` updates what the algorithm adapts, which in SSNE is nothing; its
  parent replaces a proposal that was not evaluated. Then the survivors of the
  species, repeated as often as needed, replace the algorithm's population.
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


def _tell_distribution(
  algorithm: Any, key: Array, state: State, feedback: Feedback, params: Any
) -> State:
  """Next state with an algorithm that keeps a distribution.

  A proposal that was not evaluated gets the median fitness, so that the
  distribution moves neither towards it nor away from it. Without any
  evaluation the distribution stays as it is.
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


def _survivors(state: State, feedback: Feedback) -> Float[Array, 'P D']:
  """Networks of the survivors, one for each row of the population."""
  return variation.survivors(state.members, state.asked, feedback.source)


class Policy(NamedTuple):
  """Functions that make weights and turn them into choices."""

  start: Callable[[Array], PyTree]  # key -> random weights
  choose: Callable[[PyTree], Int[Array, ' N']]  # weights -> choices, int32


def _blank(policy: Policy) -> PyTree:
  """Weights of a policy, all zero."""
  weights = jax.eval_shape(policy.start, jax.random.key(0))
  return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), weights)


def unravel(policy: Policy) -> Callable[[Array], PyTree]:
  """Function from a vector [D], as in `State.members`, to weights."""
  return flatten_util.ravel_pytree(_blank(policy))[1]


def most_likely(problem: Problem, network: nn.Module) -> Policy:
  """Policy that takes the most likely allowed choice at each node.

  Args:
    problem: the problem to search; the network reads its graph.
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
  """Species of networks, evolved by SSNE or by an evosax algorithm.

  Args:
    policy: from weights to choices.
    population_size: P.
    algorithm: one of `algorithms()`.
    proposals: networks made in a generation, at least; P if that is larger.

  Raises:
    InputError: the algorithm is unknown, or does not accept this number of
      networks.
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
    # evosax returns weakly typed numbers, which would cause a second trace.
    inner = jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), inner)
    places = jnp.int32(population_size)
    return State(asked[:population_size], asked, inner, places)

  def ask(key, state):
    wanted = blocks.num_proposals(state.places)
    # Other algorithms make all children; that takes less time than computing
    # their choices.
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
