"""NEMO's generation (arXiv 2106.07611) for any problem and any species.

A generation has five steps. Every species proposes offspring, and the surrogate
picks those that are evaluated. The utility of a species is the R2 indicator of
its members. An upper confidence bound of the utility sets its size. NSGA-III
ranks the parents and offspring of all species together. Each species keeps as
many of its own best-ranked members as its size allows.

  search = nemo.make(problem, team, population_size=64)
  state = search.init(init_key)
  state, metrics = search.step(key, state)

Or with objectives that are computed elsewhere:

  asked, state = search.ask(key, state)
  objectives = ...  # [P, M], of asked.choices [P, N]
  state, metrics = search.tell(key, state, asked, objectives)

`key` is the same in all generations of a run: the number of the generation is
folded into it. A run that is stored and restored therefore continues exactly as
it would have without the interruption.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from nemo_jax import pareto
from nemo_jax.core import checks
from nemo_jax.core.types import Array, ArrayLike, InputError
from nemo_jax.search import allocation, contract, progress, screening, survival
from nemo_jax.search import surrogate as surrogate_lib
from nemo_jax.search.compilation import compile_generation
from nemo_jax.search.evaluate import evaluate
from nemo_jax.search.functions import Search
from nemo_jax.search.problem import (
  Population,
  Problem,
  Species,
  SurrogateBuilder,
)
from nemo_jax.search.screening import Asked
from nemo_jax.search.state import Metrics, State


def make(
  problem: Problem,
  team: Iterable[Callable[[Problem, int], Species]],
  population_size: Any,
  *,
  surrogate: SurrogateBuilder | None = surrogate_lib.make,
  exploration: Any = 1.0,
  utility: str = 'r2',
  partitions: int = 12,
  archive_size: Any = 1024,
  batch_size: int | None = None,
) -> Search:
  """Functions of a search, for a problem and a team of species.

  Args:
    problem: the problem to search.
    team: builders of the species, such as `species.team(['nemo']).values()`.
    population_size: P, a whole number from 2 S; also the number of evaluations
      of a generation.
    surrogate: builder of the surrogate, which is fitted to the evaluations and
      picks the proposals to evaluate; None for no surrogate.
    exploration: weight of the confidence bonus, 0 or more; see
      `allocation.allocate`.
    utility: the measure that sizes of species depend on, one of
      `allocation.UTILITIES`.
    partitions: of the reference directions, see `pareto.reference_directions`.
    archive_size: A, slots for non-dominated solutions, a whole number from 1.
    batch_size: candidates evaluated at once, see `evaluate`.

  Raises:
    InputError: the problem is invalid (see `contract.check_problem`); there are
      fewer than two places for each species; a species needs a prior and the
      problem has none; or an option is out of range.
  """
  contract.check_problem(problem)
  team = list(team)
  checks.whole('population_size', population_size)
  allocation.check_size(population_size, len(team))
  checks.whole('archive_size', archive_size)
  allocation.check_options(exploration, utility, problem.ideal.shape[0])
  species = tuple(build(problem, population_size) for build in team)
  # The problem is the first argument, so that programs can take it as one.
  ask_of = functools.partial(_ask, species, surrogate)
  tell_of = functools.partial(
    _tell, species, surrogate, exploration, utility, partitions
  )

  def init(key):
    sizes = population_size, archive_size
    return _init(species, surrogate, problem, key, *sizes)

  def ask(key, state):
    return ask_of(problem, key, state)

  def tell(key, state, asked, objectives):
    return tell_of(problem, key, state, asked, objectives)

  def step(key, state, data=None):
    asked, state = ask(key, state)
    own = problem if data is None else dataclasses.replace(problem, data=data)
    objectives = evaluate(own, asked.choices, batch_size)
    return tell(key, state, asked, objectives)

  def compile_step(key, state):
    return compile_generation(problem, ask_of, tell_of, key, state, batch_size)

  return Search(init, ask, tell, step, compile_step)


def _init(
  species: tuple[Species, ...],
  surrogate: SurrogateBuilder | None,
  problem: Problem,
  key: Array,
  population_size: int,
  archive_size: int,
) -> State:
  """State before the first generation; see `functions.Init`."""
  nodes, objectives = problem.allowed.shape[0], problem.ideal.shape[0]
  shares = jnp.full(len(species), 1 / len(species))
  sizes = allocation.apportion(shares, population_size)
  owners = allocation.owners_of(sizes, population_size)
  keys = jax.random.split(key, len(species))
  model = surrogate(problem) if surrogate else None
  empty = functools.partial(
    pareto.empty_population, num_nodes=nodes, num_objectives=objectives
  )
  state = State(
    generation=jnp.zeros((), jnp.int32),
    population=empty(population_size)._replace(species=owners),
    archive=empty(archive_size),
    species=tuple(s.init(k) for s, k in zip(species, keys, strict=True)),
    evaluations=jnp.zeros(len(species), jnp.int32),
    failures=jnp.zeros((), jnp.int32),
    surrogate=model.init() if model else (),
  )
  # No two leaves share a buffer, so that a state can be donated.
  return jax.tree.map(jnp.copy, state)


def _keys(key: Array, state: State) -> Array:
  """Keys of asking, ranking, telling and learning, in this generation."""
  return jax.random.split(jax.random.fold_in(key, state.generation), 4)


def _ask(
  species: tuple[Species, ...],
  surrogate: SurrogateBuilder | None,
  problem: Problem,
  key: Array,
  state: State,
) -> tuple[Asked, State]:
  """Candidates to evaluate, and the next state; see `functions.Ask`."""
  asked, states = screening.propose(
    problem,
    _keys(key, state)[0],
    state.population,
    state.archive,
    species,
    state.species,
    surrogate(problem) if surrogate else None,
    state.surrogate,
  )
  return asked, state._replace(species=states)


def _add(
  count: Int[Array, ' *s'], more: Int[Array, ' *s']
) -> Int[Array, ' *s']:
  """Sum in int32; the largest int32 where it would overflow."""
  most = jnp.iinfo(jnp.int32).max
  return jnp.where(count > most - more, most, count + more)


def _offspring(
  problem: Problem, asked: Asked, objectives: ArrayLike
) -> Population:
  """Evaluated candidates [P, ...]; all objectives of a failed row are +inf."""
  wanted = len(asked.choices), problem.ideal.shape[0]
  if jnp.shape(objectives) != wanted:
    raise InputError(
      f'objectives have shape {jnp.shape(objectives)}; what was asked for has '
      f'{wanted}'
    )
  objectives = jnp.asarray(objectives, jnp.float32)
  failed = ~jnp.all(jnp.isfinite(objectives), axis=-1)
  objectives = jnp.where(failed[:, None], jnp.inf, objectives)
  return Population(asked.choices, objectives, asked.proposer)


def _rank(
  key: Array, problem: Problem, pool: Population, directions: ArrayLike
) -> tuple[Float[Array, 'n M'], Bool[Array, ' n'], Float[Array, ' n']]:
  """Scaled objectives, membership and ranks of a pool of n rows.

  A row that repeats another is no member and cannot survive. It still has a
  rank, behind all members, as the fitness that its species gets. Failed rows
  have rank +inf.
  """
  valid = jnp.all(jnp.isfinite(pool.objectives), axis=-1)
  choices = screening.narrow(problem, pool.choices)
  member = valid & ~pareto.duplicated(choices, valid)
  scaled = progress.scale(problem, pool.objectives)
  order = pareto.nsga3_order(key, scaled, directions, member)
  count = len(pool.species)
  rank = jnp.zeros(count).at[order].set(jnp.arange(float(count)))
  return scaled, member, jnp.where(valid, rank, jnp.inf)


def _tell(
  species: tuple[Species, ...],
  surrogate: SurrogateBuilder | None,
  exploration: Any,
  utility: str,
  partitions: int,
  problem: Problem,
  key: Array,
  state: State,
  asked: Asked,
  objectives: ArrayLike,
) -> tuple[State, Metrics]:
  """Next state, and metrics; see `functions.Tell`."""
  _, rank_key, tell_key, seen_key = _keys(key, state)
  count = len(species)
  places = state.population.species.shape[0]
  directions = pareto.reference_directions(problem.ideal.shape[0], partitions)
  offspring = _offspring(problem, asked, objectives)
  failed = ~jnp.all(jnp.isfinite(offspring.objectives), axis=-1)
  evaluations = _add(
    state.evaluations,
    jax.ops.segment_sum(jnp.ones(places, jnp.int32), offspring.species, count),
  )
  pool = jax.tree.map(
    lambda a, b: jnp.concatenate([a, b]), state.population, offspring
  )
  scaled, member, rank = _rank(rank_key, problem, pool, directions)
  # R2 does not use the front; XLA then removes its computation.
  front = pareto.nondominated_rank(scaled, member)
  worth = allocation.utility(
    utility, scaled, pool.species, count, directions, member, front
  )
  sizes = allocation.allocate(worth, evaluations, places, exploration)
  population, kept_rank, source = survival.survive(
    jnp.where(member, rank, jnp.inf), pool, asked, sizes
  )
  learned, belief = None, state.surrogate
  if model := surrogate(problem) if surrogate else None:
    belief, learned = model.update(seen_key, belief, offspring)
  feedback = survival.feedback(
    population, kept_rank, source, asked, rank[places:], learned
  )
  keys = jax.random.split(tell_key, count)
  rows = zip(species, keys, state.species, feedback, strict=True)
  told = (one.tell(own, last, said) for one, own, last, said in rows)
  new = State(
    generation=state.generation + 1,
    population=population,
    archive=pareto.archive_insert(state.archive, offspring, problem.reference),
    species=tuple(told),
    evaluations=evaluations,
    failures=_add(state.failures, jnp.sum(failed, dtype=jnp.int32)),
    surrogate=belief,
  )
  # The state keeps the types of its leaves, so that it is traced only once.
  new = jax.tree.map(lambda x, old: jnp.asarray(x, old.dtype), new, state)
  return new, _metrics(new, problem, worth, directions)


def _metrics(
  state: State, problem: Problem, utility: Array, directions: ArrayLike
) -> Metrics:
  """Metrics of a generation; arrays over species are [S]."""
  count = len(state.species)
  ones = jnp.ones_like(state.population.species)
  front = progress.front_metrics(problem, state.archive, count, directions)
  return front | {
    'generation': state.generation,
    'failures': state.failures,
    'utility': utility,
    'allocation': jax.ops.segment_sum(ones, state.population.species, count),
    'evaluations': state.evaluations,
  }
