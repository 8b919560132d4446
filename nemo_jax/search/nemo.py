"""NEMO's generation (arXiv 2106.07611) for any problem and any species.

Five steps: every species makes offspring, and those are evaluated that a
surrogate picks; the utility of a species is its R2 indicator; an upper
confidence bound of the utility sets its size; parents and offspring of all
species are ranked together by NSGA-III; each species fills its size with its
own best.

  search = nemo.make(problem, team, population_size=64)
  state = search.init(init_key)
  state, metrics = search.step(key, state)

Or with candidates scored elsewhere, by whatever can score them:

  asked, state = search.ask(key, state)
  objectives = ...  # [P, M], of asked.choices [P, N]
  state, metrics = search.tell(key, state, asked, objectives)

`key` stays the same all through a run: the generation is folded into it, so a
run that is stored and restored goes on as if it had never stopped.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from nemo_jax import pareto
from nemo_jax.core import checks
from nemo_jax.core.types import Array, ArrayLike, InputError, PyTree
from nemo_jax.search import allocation, contract, progress, screening, survival
from nemo_jax.search import surrogate as surrogate_lib
from nemo_jax.search.compilation import Compiled, compile_generation
from nemo_jax.search.evaluate import evaluate
from nemo_jax.search.problem import (
  Population,
  Problem,
  Species,
  SpeciesBuilder,
  SurrogateBuilder,
)
from nemo_jax.search.screening import Asked
from nemo_jax.search.state import Metrics, State


class Init(Protocol):
  """The state before the first generation."""

  def __call__(self, key: Array) -> State:
    """Returns a state with nothing evaluated and equal shares."""


class Ask(Protocol):
  """The first half of a generation."""

  def __call__(self, key: Array, state: State) -> tuple[Asked, State]:
    """Returns what to evaluate, and the state after it; reads no data.

    Raises:
      InputError: a species does not propose choices.
    """


class Tell(Protocol):
  """The second half of a generation."""

  def __call__(
    self, key: Array, state: State, asked: Asked, objectives: Array
  ) -> tuple[State, Metrics]:
    """Returns the next state, and metrics; reads no data.

    Args:
      key: that `ask` was given.
      state: that it returned.
      asked: what it returned.
      objectives: [P, M] of `asked.choices`; not finite anywhere in a row where
        that evaluation failed.

    Raises:
      InputError: the objectives are not of the shape that was asked for.
    """


class Step(Protocol):
  """One generation: `ask`, an evaluation, `tell`."""

  def __call__(
    self, key: Array, state: State, data: PyTree = None
  ) -> tuple[State, Metrics]:
    """Returns the next state, and metrics.

    Pure, so that `jit`, `vmap` over keys and `lax.scan` over generations apply.

    Args:
      key: of the run, the same at every generation.
      state: from `init` or the last `step`.
      data: the problem's, its own if absent. As an argument of a jitted
        function they are not copied into the program.
    """


class Compile(Protocol):
  """A generation as programs for the problem's devices."""

  def __call__(self, key: Array, state: State) -> Compiled:
    """Returns the programs; see `compilation.compile_generation`."""


class Search(NamedTuple):
  """The functions of one search, all for the same problem and species."""

  init: Init
  ask: Ask
  tell: Tell
  step: Step
  compile: Compile


def make(
  problem: Problem,
  team: Sequence[SpeciesBuilder],
  population_size: int,
  *,
  surrogate: SurrogateBuilder | None = surrogate_lib.make,
  exploration: float = 1.0,
  utility: str = 'r2',
  partitions: int = 12,
  archive_size: int = 1024,
  batch_size: int | None = None,
) -> Search:
  """The functions of a search, bound to a problem and a team of species.

  Args:
    problem: what is searched.
    team: builders of the species, such as `species.team(['nemo']).values()`.
    population_size: P, which is also the evaluations of a generation.
    surrogate: builder of what learns from evaluations and picks what is worth
      one; None for none.
    exploration: weight of the confidence bonus, see `allocation.allocate`.
    utility: by which species get their sizes, of `allocation.UTILITIES`.
    partitions: of the reference directions, see `pareto.reference_directions`.
    archive_size: A, slots for non-dominated points.
    batch_size: candidates evaluated at once, see `evaluate`.

  Raises:
    InputError: the problem does not fit together (see
      `contract.check_problem`); fewer than two places for a species; a species
      needs what the problem lacks; an option is out of its range.
  """
  contract.check_problem(problem)
  team = list(team)
  checks.whole('population_size', population_size)
  allocation.check_size(population_size, len(team))
  checks.whole('archive_size', archive_size)
  allocation.check_options(exploration, utility, problem.ideal.shape[0])
  species = tuple(build(problem, population_size) for build in team)
  # With the problem as their first argument, for programs that take it as one.
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
  """The state before the first generation; see `Init`."""
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
  """Of asking, ranking, telling and learning, in this generation."""
  return jax.random.split(jax.random.fold_in(key, state.generation), 4)


def _ask(
  species: tuple[Species, ...],
  surrogate: SurrogateBuilder | None,
  problem: Problem,
  key: Array,
  state: State,
) -> tuple[Asked, State]:
  """What to evaluate, and the state after it; see `Ask`."""
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


def _add(count: Array, more: Array) -> Array:
  """int32[...]: the sum, or the largest number where it is beyond."""
  most = jnp.iinfo(jnp.int32).max
  return jnp.where(count > most - more, most, count + more)


def _offspring(problem: Problem, asked: Asked, objectives: Array) -> Population:
  """What was evaluated [P, ...]; all objectives of a failed row are +inf."""
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
) -> tuple[Array, Array, Array]:
  """Scaled objectives [n, M], members bool[n] and ranks float32[n] of a pool.

  A repeated row is no member, for it cannot live on; but it has a rank, from
  which its species learns that it did badly. Failed rows have +inf.
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
  exploration: float,
  utility: str,
  partitions: int,
  problem: Problem,
  key: Array,
  state: State,
  asked: Asked,
  objectives: Array,
) -> tuple[State, Metrics]:
  """The next state, and metrics; see `Tell`."""
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
  front = pareto.nondominated_rank(scaled, member)  # unused by R2, so dropped
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
  # One trace for a whole run: no leaf may change its type or be weakly typed.
  new = jax.tree.map(lambda x, old: jnp.asarray(x, old.dtype), new, state)
  return new, _metrics(new, problem, worth, directions)


def _metrics(
  state: State, problem: Problem, utility: Array, directions: ArrayLike
) -> Metrics:
  """What a run logs of a generation; arrays over species are [S]."""
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
