"""NEMO's generation (arXiv 2106.07611) for any problem and any species.

Five steps: every species makes offspring and they are evaluated, first those
that a surrogate expects most of, where it `applies`; the utility
of a species is its R2 indicator; an upper confidence bound of the utility sets
its size; parents and offspring of all species are ranked together by NSGA-III;
each species fills its size with its own best.

  state = nemo.init(key, problem, species, population_size=64)
  state, metrics = nemo.step(key, state, problem, species)

Or with candidates scored elsewhere, by whatever can score them:

  asked, state = nemo.ask(key, state, problem, species)
  objectives = ...  # [P, M], of asked.choices [P, N]
  state, metrics = nemo.tell(key, state, problem, species, asked, objectives)

`key` stays the same all through a run: the generation is folded into it, so a
run that is stored and restored goes on as if it had never stopped.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from nemo_jax import pareto
from nemo_jax.core import checks, devices
from nemo_jax.core.types import Array, InputError
from nemo_jax.search import contract, surrogate, variation
from nemo_jax.search.evaluate import evaluate
from nemo_jax.search.problem import Feedback, Population, Problem, Species

UTILITIES = ('r2', 'hypervolume', 'front_count')


class State(NamedTuple):
  """Everything a search carries from one generation to the next."""

  generation: Array  # int32[]
  population: Population  # [P, ...], rows of a species together
  # [A, ...], every non-dominated point seen; see `pareto.archive_insert`.
  archive: Population
  species: tuple[Any, ...]  # the private state of each
  evaluations: Array  # int32[S], done for each species; see `_add`
  failures: Array  # int32[], evaluations with an objective that is not finite
  seen: Population  # [H, ...], the last evaluations
  belief: surrogate.Belief  # what they say of others


def check_size(population_size: int, species: int) -> None:
  """Raises `InputError` unless there are two places for each species."""
  if not species:
    raise InputError('there are no species; give at least one')
  if population_size < 2 * species:
    raise InputError(
      f'a population of {population_size} is too small for {species} '
      'species: each needs two places'
    )


def init(
  key: Array,
  problem: Problem,
  species: tuple[Species, ...],
  population_size: int,
  archive_size: int = 1024,
) -> State:
  """The state before the first generation: nothing evaluated, equal shares.

  Raises:
    InputError: fewer than two places for a species; no slot in the archive; the
      problem does not fit together (see `contract.check_problem`), or a species
      was made for another.
  """
  checks.whole('population_size', population_size)
  check_size(population_size, len(species))
  checks.whole('archive_size', archive_size)
  contract.check_problem(problem)
  contract.check_species(problem, species)
  nodes, objectives = problem.allowed.shape[0], problem.ideal.shape[0]
  shares = jnp.full(len(species), 1 / len(species))
  owners = _owners(_apportion(shares, population_size), population_size)
  keys = jax.random.split(key, len(species))
  state = State(
    generation=jnp.zeros((), jnp.int32),
    population=pareto.empty_population(
      population_size, nodes, objectives
    )._replace(species=owners),
    archive=pareto.empty_population(archive_size, nodes, objectives),
    species=tuple(s.init(k) for s, k in zip(species, keys, strict=True)),
    evaluations=jnp.zeros(len(species), jnp.int32),
    failures=jnp.zeros((), jnp.int32),
    seen=pareto.empty_population(surrogate.MEMORY, nodes, objectives),
    belief=surrogate.nothing(problem),
  )
  # No two leaves share a buffer, so that a state can be donated.
  return jax.tree.map(jnp.copy, state)


def _apportion(shares: Array, places: int, least: int = 2) -> Array:
  """int32[S]: places by share, at least `least` each, by largest remainder."""
  free = places - least * shares.shape[0]
  exact = shares / jnp.sum(shares) * free
  whole = jnp.floor(exact)
  order = jnp.argsort(jnp.argsort(whole - exact))
  extra = order < free - jnp.sum(whole)
  return (least + whole + extra).astype(jnp.int32)


def _owners(sizes: Array, places: int) -> Array:
  """int32[P]: the species of each row, rows of a species together."""
  return jnp.searchsorted(
    jnp.cumsum(sizes), jnp.arange(places), side='right'
  ).astype(jnp.int32)


def _place(owners: Array) -> Array:
  """int32[P]: how many earlier rows have the same owner; owners are sorted."""
  return jnp.arange(owners.shape[0]) - jnp.searchsorted(owners, owners)


def allocate(
  utility: Array, evaluations: Array, places: int, exploration: float
) -> Array:
  """int32[S]: the size of each species, by upper confidence bound.

  The score is v + c sqrt(ln(sum y) / y), where y counts the evaluations of a
  species and v is its utility, scaled so that the best species has 1 and the
  worst 0 (the paper's own scaling is not known). Sizes are proportional to
  the scores; a species without any solution has v = 0.

  Args:
    utility: [S] of each species, lower is better.
    evaluations: int32[S].
    places: P, the sum of the sizes.
    exploration: c; 0 makes sizes proportional to utility, infinity equal.
  """
  known = jnp.isfinite(utility)
  best = jnp.min(utility, where=known, initial=jnp.inf)
  worst = jnp.max(utility, where=known, initial=-jnp.inf)
  span = jnp.where(worst > best, worst - best, 1)
  value = jnp.where(known, (worst - utility) / span, 0)
  # Not as integers, which might wrap.
  total = jnp.sum(evaluations.astype(jnp.float32))
  bonus = jnp.sqrt(jnp.log(jnp.maximum(total, 1)) / jnp.maximum(evaluations, 1))
  # Without this, a tie of all at v = 0 and c = 0 would divide by zero.
  score = value + exploration * bonus + 1e-6
  return _apportion(jnp.where(jnp.isinf(exploration), 1, score), places)


@flax.struct.dataclass
class Asked:
  """What the species proposed, R rows in all, and which of it to evaluate."""

  choices: Array  # [P, N] int32, to be evaluated
  proposer: Array  # [P] int32, the species of each
  row: Array  # [P] int32, the row of `proposed` behind each
  proposed: Array  # [R, N], rows of a species together, in few bytes
  queue: Array  # [R] int32, the same rows in order of preference
  # How many rows of `proposed` are of each species.
  counts: tuple[int, ...] = flax.struct.field(pytree_node=False)


def _starts(counts: tuple[int, ...]) -> np.ndarray:
  """int[S]: the first row of each species, of so many rows each."""
  return np.cumsum([0, *counts[:-1]])


def _narrow(problem: Problem, choices: Array) -> Array:
  """The same choices, in as few bytes as hold them."""
  return choices.astype(np.min_scalar_type(problem.allowed.shape[1] - 1))


def _select(key, state, problem, asked, proposer, start, screened: bool):
  """What is evaluated: the order of each species' proposals, and P rows.

  First comes what is neither alive, in the archive, nor proposed twice; and of
  this what promises most, where it is screened by the surrogate. Places for
  which a species has nothing new then go to new proposals of others.

  Returns:
    int32[R], the rows of the proposals, species by species, in order of
    preference; int32[P], those to evaluate, ascending, which are the first of
    each species.
  """
  owners = state.population.species
  living = jnp.all(jnp.isfinite(state.population.objectives), axis=-1)
  archived = jnp.all(jnp.isfinite(state.archive.objectives), axis=-1)
  rows = [state.archive.choices, state.population.choices, asked]
  known = [archived, living, jnp.ones(len(asked), bool)]
  repeated = pareto.duplicated(
    jnp.concatenate([_narrow(problem, x) for x in rows]), jnp.concatenate(known)
  )
  repeated = repeated[-len(asked) :]
  if not screened:
    queue = pareto.order(2 * proposer + repeated, 2 * len(start))
    return queue, jnp.sort(queue[jnp.asarray(start)[owners] + _place(owners)])
  places = jax.ops.segment_sum(jnp.ones_like(owners), owners, len(start))
  # In the first generation no species has earned its places yet.
  places = jnp.where(jnp.any(living), places, len(owners))
  # Of very many proposals the surrogate sees the first of each species.
  most = max(surrogate.PROPOSALS, 3 * len(owners) // 2)
  longest = len(asked)
  early = pareto.order(longest * repeated + _place(proposer), 2 * longest)
  seen = jnp.sort(early[:most])
  turn = surrogate.turns(
    key,
    problem,
    state.belief,
    state.archive,
    asked[seen].astype(jnp.int32),
    jnp.where(repeated, -1, proposer)[seen],
    places,
    len(owners),
  )
  last = surrogate.ROUNDS
  turn = jnp.minimum(turn, last).astype(jnp.int32)
  turn = jnp.full(len(asked), last).at[seen].set(turn)
  # What is new by its turn, then what is not.
  turn += (last + 1) * repeated
  row = pareto.order(turn, 2 * (last + 1))[: len(owners)]
  queue = 2 * (last + 1) * proposer + turn
  queue = pareto.order(queue, 2 * (last + 1) * len(start))
  return queue, jnp.sort(row)


def _add(count: Array, more: Array) -> Array:
  """int32[...]: the sum, or the largest number where it is beyond."""
  most = jnp.iinfo(jnp.int32).max
  return jnp.where(count > most - more, most, count + more)


def _keys(key: Array, state: State) -> Array:
  """Of asking, ranking, telling and remembering, in this generation."""
  return jax.random.split(jax.random.fold_in(key, state.generation), 4)


def _propose(ask, problem: Problem, key: Array, state) -> tuple[Array, Any]:
  """Proposals [Q, N] of a species, all of them allowed, and its state."""
  choices, state = ask(key, state)
  nodes, count = problem.allowed.shape
  choices = checks.array(
    'what a species proposes', choices, 'QN', 'whole', N=nodes
  )
  choices = jnp.clip(choices, 0, count - 1)
  choices = variation.nearest_allowed(choices, problem.allowed)
  return _narrow(problem, choices), state


def ask(
  key: Array,
  state: State,
  problem: Problem,
  species: tuple[Species, ...],
  *,
  screen: bool = True,
) -> tuple[Asked, State]:
  """The first half of a generation: what to evaluate, and the state after it.

  Every species proposes P rows or more; about as many as it has places are
  evaluated, first those that a surrogate expects most of, where it `applies`.
  The arguments are those of `step`; nothing reads the problem's data.

  Raises:
    InputError: a species was made for another population size or another
      problem, or does not propose choices.
  """
  contract.check_species(problem, species)
  *keys, select_key = jax.random.split(_keys(key, state)[0], len(species) + 1)
  # Here alone it is decided whether the surrogate chooses.
  screened = screen and surrogate.applies(problem)
  asked, states = zip(
    *(
      _propose(s.ask_more if screened and s.ask_more else s.ask, problem, *rest)
      for s, *rest in zip(species, keys, state.species, strict=True)
    ),
    strict=True,
  )
  places = len(state.population.species)
  counts = tuple(len(proposed) for proposed in asked)
  if min(counts) < places:
    raise InputError(
      f'a species was made for a population of {min(counts)}; this one has '
      f'{places}'
    )
  proposed = jnp.concatenate(asked)
  start = _starts(counts)
  proposer = jnp.asarray(np.repeat(np.arange(len(species)), counts), jnp.int32)
  queue, row = _select(
    select_key, state, problem, proposed, proposer, start, screened
  )
  choices = proposed[row].astype(jnp.int32)
  asked = Asked(choices, proposer[row], row, proposed, queue, counts)
  return asked, state._replace(species=states)


def _survive(rank, pool, asked, sizes):
  """Step 5: each species fills its size with its own best-ranked members.

  What is left over is filled with random offspring of the species, namely
  proposals that were not evaluated. Returns the survivors, their ranks and
  where the genotype of each lies (see `Feedback.source`).
  """
  places = asked.row.shape[0]
  count = sizes.shape[0]
  owners = _owners(sizes, places)
  member = jnp.isfinite(rank)
  group = jnp.where(member, pool.species, count)
  last = 2 * places - 1
  behind = jnp.minimum(rank, last).astype(jnp.int32)
  order = pareto.order((last + 1) * group + behind, (last + 1) * (count + 1))
  first = jnp.searchsorted(group[order], jnp.arange(count))
  members = jax.ops.segment_sum(member.astype(jnp.int32), group, count + 1)
  place = _place(owners)
  kept = place < members[owners]
  chosen = order[jnp.where(kept, first[owners] + place, 0)]

  evaluated = jax.ops.segment_sum(
    jnp.ones(places, jnp.int32), asked.proposer, count
  )
  start = jnp.asarray(_starts(asked.counts))[owners]
  spare = evaluated[owners] + place - members[owners]
  last = jnp.asarray(asked.counts)[owners] - 1
  spare = asked.queue[start + jnp.clip(spare, 0, last)]
  parent = chosen < places
  row = jnp.where(kept, asked.row[jnp.where(parent, 0, chosen - places)], spare)
  source = jnp.where(kept & parent, chosen, places + row - start)
  population = Population(
    choices=jnp.where(
      kept[:, None], pool.choices[chosen], asked.proposed[spare]
    ),
    objectives=jnp.where(kept[:, None], pool.objectives[chosen], jnp.inf),
    species=owners,
  )
  rank = jnp.where(kept, rank[chosen], jnp.inf)
  return population, rank, source.astype(jnp.int32)


def _feedback(count, population, kept_rank, source, asked, rank, learned):
  """What each species learns; `rank` is that of the offspring."""
  fitness = jnp.full(len(asked.proposed), jnp.inf)
  fitness = fitness.at[asked.row].set(rank)
  fitness = jnp.split(fitness, _starts(asked.counts)[1:])
  return [
    Feedback(
      population,
      kept_rank,
      population.species == index,
      source,
      fitness[index],
      learned,
    )
    for index in range(count)
  ]


def _metrics(state: State, problem: Problem, utility, directions) -> dict:
  """What a run logs; arrays over species are [S]."""
  count = len(state.species)
  archive = state.archive
  filled = jnp.all(jnp.isfinite(archive.objectives), axis=-1)
  scaled = scale_objectives(problem, archive.objectives)
  owner = jnp.where(filled, archive.species, count)
  share = jax.ops.segment_sum(filled.astype(jnp.float32), owner, count + 1)
  ones = jnp.ones_like(state.population.species)
  metrics = {
    'generation': state.generation,
    'r2': pareto.r2(scaled, directions, jnp.zeros(scaled.shape[1]), filled),
    'front_size': jnp.sum(filled),
    'best': jnp.min(archive.objectives, axis=0),
    'failures': state.failures,
    'utility': utility,
    'allocation': jax.ops.segment_sum(ones, state.population.species, count),
    'front_share': share[:count] / jnp.maximum(jnp.sum(share), 1),
    'evaluations': state.evaluations,
  }
  if scaled.shape[1] in (2, 3):
    metrics['hypervolume'] = hypervolume(problem, archive.objectives, filled)
  return metrics


def scale_objectives(problem: Problem, objectives: Array) -> Array:
  """Objectives with the problem's ideal point at 0, its reference at 1."""
  return (objectives - problem.ideal) / (problem.reference - problem.ideal)


def hypervolume(
  problem: Problem, objectives: Array, mask: Array | None = None
) -> Array:
  """float[]: volume between the rows [n, M] and the reference, of at most 1."""
  scaled = scale_objectives(problem, objectives)
  return pareto.hypervolume(scaled, jnp.ones(scaled.shape[1]), mask)


def _check_options(exploration, kind: str, objectives: int) -> None:
  known = checks.concrete(exploration)
  if known is not None and not known >= 0:
    raise InputError(f'exploration is {exploration}; give 0 or more')
  if kind not in UTILITIES:
    raise InputError(
      f'unknown utility {kind!r}; the choices are {", ".join(UTILITIES)}'
    )
  if kind == 'hypervolume' and objectives not in (2, 3):
    raise InputError('hypervolume as utility needs two or three objectives')


def _utility(kind: str, scaled, species, count, directions, member, rank):
  """float32[S]: what each species is worth, lower is better.

  The R2 indicator of its members, as in the paper; or, with the sign turned,
  the hypervolume that would be lost without them, or how many of them are on
  the first front, as in the patent. A species without members has +inf.
  """
  owned = jnp.arange(count)[:, None] == species  # [S, n]
  if kind == 'r2':
    zeros = jnp.zeros(scaled.shape[1])
    return pareto.r2(scaled, directions, zeros, owned & member)
  if kind == 'hypervolume':
    ones = jnp.ones(scaled.shape[1])
    volume = lambda mask: pareto.hypervolume(scaled, ones, mask & member)
    worth = volume(member) - jax.lax.map(volume, ~owned)
  else:
    worth = jnp.sum(owned & member & (rank == 0), axis=1)
  present = jnp.any(owned & member, axis=1)
  return jnp.where(present, -worth.astype(jnp.float32), jnp.inf)


def tell(
  key: Array,
  state: State,
  problem: Problem,
  species: tuple[Species, ...],
  asked: Asked,
  objectives: Array,
  *,
  exploration: float = 1.0,
  utility: str = 'r2',
  partitions: int = 12,
) -> tuple[State, dict[str, Array]]:
  """The second half of a generation: the next state, and metrics.

  Args:
    key: that `ask` was given.
    state: that it returned.
    problem: that it was given.
    species: the same.
    asked: what it returned.
    objectives: [P, M] of `asked.choices`; not finite anywhere in a row where
      that evaluation failed.
    exploration: see `step`, as for those that follow.
    utility: one of UTILITIES.
    partitions: of the reference directions.

  Raises:
    InputError: the exploration is below zero or no number, the utility unknown
      or not for so many objectives, or these are not of the shape that was
      asked for.
  """
  _check_options(exploration, utility, problem.ideal.shape[0])
  wanted = len(asked.choices), problem.ideal.shape[0]
  if jnp.shape(objectives) != wanted:
    raise InputError(
      f'objectives have shape {jnp.shape(objectives)}; what was asked for has '
      f'{wanted}'
    )
  _, rank_key, tell_key, seen_key = _keys(key, state)
  count = len(species)
  places = state.population.species.shape[0]
  directions = pareto.reference_directions(problem.ideal.shape[0], partitions)

  objectives = jnp.asarray(objectives, jnp.float32)
  failed = ~jnp.all(jnp.isfinite(objectives), axis=-1)
  objectives = jnp.where(failed[:, None], jnp.inf, objectives)
  offspring = Population(asked.choices, objectives, asked.proposer)
  evaluations = _add(
    state.evaluations,
    jax.ops.segment_sum(jnp.ones(places, jnp.int32), offspring.species, count),
  )
  pool = jax.tree.map(
    lambda a, b: jnp.concatenate([a, b]), state.population, offspring
  )
  valid = jnp.all(jnp.isfinite(pool.objectives), axis=-1)
  choices = _narrow(problem, pool.choices)
  member = valid & ~pareto.duplicated(choices, valid)

  scaled = scale_objectives(problem, pool.objectives)
  front = pareto.nondominated_rank(scaled, member)  # unused by R2, so dropped
  worth = _utility(
    utility, scaled, pool.species, count, directions, member, front
  )
  sizes = allocate(worth, evaluations, places, exploration)

  order = pareto.nsga3_order(rank_key, scaled, directions, member)
  rank = jnp.zeros(2 * places).at[order].set(jnp.arange(2.0 * places))
  # A repeated row cannot live on, but its species learns that it did badly.
  rank = jnp.where(valid, rank, jnp.inf)

  population, kept_rank, source = _survive(
    jnp.where(member, rank, jnp.inf), pool, asked, sizes
  )
  seen = surrogate.remember(seen_key, state.seen, offspring)
  learned, belief = None, state.belief
  if problem.estimate is not None:
    learned = surrogate.learn(problem, seen)
    belief = surrogate.believe(learned)
  feedback = _feedback(
    count, population, kept_rank, source, asked, rank[places:], learned
  )
  keys = jax.random.split(tell_key, count)
  told = (
    one.tell(*rest)
    for one, *rest in zip(species, keys, state.species, feedback, strict=True)
  )
  new = State(
    generation=state.generation + 1,
    population=population,
    archive=pareto.archive_insert(state.archive, offspring, problem.reference),
    species=tuple(told),
    evaluations=evaluations,
    failures=_add(state.failures, jnp.sum(failed, dtype=jnp.int32)),
    seen=seen,
    belief=belief,
  )
  # One trace for a whole run: no leaf may change its type or be weakly typed.
  new = jax.tree.map(lambda x, old: jnp.asarray(x, old.dtype), new, state)
  return new, _metrics(new, problem, worth, directions)


def step(
  key: Array,
  state: State,
  problem: Problem,
  species: tuple[Species, ...],
  *,
  exploration: float = 1.0,
  utility: str = 'r2',
  screen: bool = True,
  partitions: int = 12,
  batch_size: int | None = None,
) -> tuple[State, dict[str, Array]]:
  """One generation: the next state, and metrics.

  Pure, so that `jit`, `vmap` over keys and `lax.scan` over generations apply;
  `species` is static under `jit`.

  Args:
    key: of the run, the same at every generation.
    state: from `init` or the last `step`.
    problem: what is searched.
    species: the tuple that `init` was given.
    exploration: weight of the confidence bonus in `allocate`.
    utility: by which species get their sizes, one of UTILITIES.
    screen: of what a species proposes, what promises most is evaluated, where
      the problem lets that be foretold (see `surrogate.applies`).
    partitions: of the reference directions, see `pareto.reference_directions`.
    batch_size: candidates evaluated at once, see `evaluate`.

  Raises:
    InputError: as for `ask` and `tell`.
  """
  # Before anything is evaluated.
  _check_options(exploration, utility, problem.ideal.shape[0])
  asked, state = ask(key, state, problem, species, screen=screen)
  return tell(
    key,
    state,
    problem,
    species,
    asked,
    evaluate(problem, asked.choices, batch_size),
    exploration=exploration,
    utility=utility,
    partitions=partitions,
  )


def compile_step(
  key: Array,
  state: State,
  problem: Problem,
  species: tuple[Species, ...],
  *,
  screen: bool = True,
  batch_size: int | None = None,
  **options,
) -> tuple[Callable[[State], tuple[State, dict]], jax.stages.Compiled]:
  """A generation in three programs, of which one is for the problem's mesh.

  Candidates are scored on the mesh. To ask and to tell are programs for one
  device of each process, the same ones whatever the mesh: for another number of
  devices XLA compiles to other roundings, and the search would go another way.

  Args:
    key: of the run.
    state: from `init`.
    problem: what is searched.
    species: the tuple that `init` was given.
    screen: as for `step`.
    batch_size: candidates evaluated at once, see `evaluate`.
    **options: of `tell`.

  Returns:
    What makes of a state, which it uses up, the next, and metrics; the program
    that evaluates.

  Raises:
    InputError: as for `ask` and `tell`.
  """
  contract.check_species(problem, species)
  mesh, apart = problem.mesh, problem.replace(data=None, mesh=None)
  place = lambda x: devices.place(x, mesh, PartitionSpec())
  donated = {'donate_argnames': 'state'}
  asks = functools.partial(ask, key, species=species, screen=screen)
  asks = jax.jit(asks, **donated)
  asks = asks.lower(state=state, problem=apart)
  scores = functools.partial(evaluate, batch_size=batch_size)
  scores = devices.jit(scores, mesh)
  scores = scores.lower(problem, place(state.population.choices))
  asked, after = asks.out_info
  tells = functools.partial(tell, key, species=species, **options)
  tells = jax.jit(tells, **donated).lower(
    state=after,
    problem=apart,
    asked=asked,
    objectives=state.population.objectives,
  )
  asks, scores, tells = asks.compile(), scores.compile(), tells.compile()

  def advance(state):
    asked, state = asks(state=state, problem=apart)
    objectives = np.asarray(scores(problem, place(asked.choices)), np.float32)
    return tells(state=state, problem=apart, asked=asked, objectives=objectives)

  return advance, scores
