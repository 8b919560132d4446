"""Which of the proposals are evaluated.

Here alone it is decided whether the surrogate chooses among them.
"""

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from nemo_jax import pareto
from nemo_jax.core import checks
from nemo_jax.core.types import Array, InputError, PyTree
from nemo_jax.pareto.archive import Population
from nemo_jax.search import variation
from nemo_jax.search.allocation import place_of
from nemo_jax.search.problem import Ask, Problem, Species, Surrogate

# In which a surrogate picks proposals, at most.
ROUNDS = 64
# Proposals that a surrogate sees, or half as many more as there are places.
PROPOSALS = 1024


@flax.struct.dataclass
class Asked:
  """What the species proposed, R rows in all, and which of it to evaluate.

  Attributes:
    choices: int32[P, N], to be evaluated.
    proposer: int32[P], the species of each.
    row: int32[P], the row of `proposed` behind each.
    proposed: [R, N], rows of a species together, in few bytes.
    queue: int32[R], the same rows, species by species, in order of preference.
    counts: how many rows of `proposed` are of each species.
  """

  choices: Array
  proposer: Array
  row: Array
  proposed: Array
  queue: Array
  counts: tuple[int, ...] = flax.struct.field(pytree_node=False)


def starts(counts: Sequence[int]) -> np.ndarray:
  """int[S]: the first row of each species, of so many rows each."""
  return np.cumsum([0, *counts[:-1]])


def narrow(problem: Problem, choices: Array) -> Array:
  """The same choices, in as few bytes as hold them."""
  return choices.astype(np.min_scalar_type(problem.allowed.shape[1] - 1))


def _proposals(
  ask: Ask, problem: Problem, key: Array, state: PyTree
) -> tuple[Array, PyTree]:
  """Proposals [Q, N] of a species, all of them allowed, and its state."""
  choices, state = ask(key, state)
  nodes, count = problem.allowed.shape
  choices = checks.array(
    'what a species proposes', choices, 'QN', 'whole', N=nodes
  )
  choices = jnp.clip(choices, 0, count - 1)
  choices = variation.nearest_allowed(choices, problem.allowed)
  return narrow(problem, choices), state


def propose(
  problem: Problem,
  key: Array,
  population: Population,
  archive: Population,
  species: Sequence[Species],
  states: Sequence[PyTree],
  surrogate: Surrogate | None,
  surrogate_state: PyTree,
) -> tuple[Asked, tuple[PyTree, ...]]:
  """The proposals of all species, what to evaluate of them, and their states.

  Args:
    problem: what is searched; its data are not read.
    key: random key.
    population: [P, ...], sorted by species.
    archive: the non-dominated points so far.
    species: S of them.
    states: of each.
    surrogate: of the search, or None.
    surrogate_state: its state.

  Raises:
    InputError: a species does not propose choices, or fewer than P.
  """
  *keys, select_key = jax.random.split(key, len(species) + 1)
  screened = surrogate is not None and surrogate.select is not None
  asked, states = zip(
    *(
      _proposals(
        s.ask_more if screened and s.ask_more else s.ask, problem, *rest
      )
      for s, *rest in zip(species, keys, states, strict=True)
    ),
    strict=True,
  )
  places = len(population.species)
  counts = tuple(len(proposed) for proposed in asked)
  if min(counts) < places:
    raise InputError(
      f'a species proposes {min(counts)} rows; a population of {places} needs '
      'as many at least'
    )
  proposed = jnp.concatenate(asked)
  proposer = jnp.asarray(np.repeat(np.arange(len(species)), counts), jnp.int32)
  repeated = _repeated(problem, population, archive, proposed)
  start = starts(counts)
  if screened:
    places = _places(population, len(start))
    rounds = _rounds(
      select_key,
      surrogate.select,
      surrogate_state,
      archive,
      proposed,
      proposer,
      repeated,
      places,
      len(population.species),
    )
    queue, row = _by_round(rounds, proposer, population.species, len(start))
  else:
    queue = pareto.order(2 * proposer + repeated, 2 * len(start))
    owners = population.species
    row = jnp.sort(queue[jnp.asarray(start)[owners] + place_of(owners)])
  choices = proposed[row].astype(jnp.int32)
  return Asked(choices, proposer[row], row, proposed, queue, counts), states


def _repeated(problem, population, archive, proposed) -> Array:
  """bool[R]: alive already, in the archive, or proposed before."""
  living = jnp.all(jnp.isfinite(population.objectives), axis=-1)
  archived = jnp.all(jnp.isfinite(archive.objectives), axis=-1)
  rows = [archive.choices, population.choices, proposed]
  known = [archived, living, jnp.ones(len(proposed), bool)]
  repeated = pareto.duplicated(
    jnp.concatenate([narrow(problem, x) for x in rows]), jnp.concatenate(known)
  )
  return repeated[-len(proposed) :]


def _places(population: Population, count: int) -> Array:
  """int32[S]: how many proposals of each species may be evaluated."""
  owners = population.species
  places = jax.ops.segment_sum(jnp.ones_like(owners), owners, count)
  living = jnp.all(jnp.isfinite(population.objectives), axis=-1)
  # In the first generation no species has earned its places yet.
  return jnp.where(jnp.any(living), places, len(owners))


def _rounds(
  key, select, state, archive, proposed, proposer, repeated, places, count
) -> Array:
  """int32[R]: when each is picked, ROUNDS if never; as much later if repeated.

  Places for which a species has nothing new go to new proposals of others.
  """
  # Of very many proposals the surrogate sees the first of each species.
  most = max(PROPOSALS, 3 * count // 2)
  longest = len(proposed)
  early = pareto.order(longest * repeated + place_of(proposer), 2 * longest)
  seen = jnp.sort(early[:most])
  picked = select(
    key,
    state,
    archive,
    proposed[seen].astype(jnp.int32),
    jnp.where(repeated, -1, proposer)[seen],
    places,
    count,
  )
  picked = jnp.minimum(picked, ROUNDS).astype(jnp.int32)
  rounds = jnp.full(len(proposed), ROUNDS).at[seen].set(picked)
  return rounds + (ROUNDS + 1) * repeated


def _by_round(
  rounds: Array, proposer: Array, owners: Array, count: int
) -> tuple[Array, Array]:
  """The queue int32[R], and the P rows to evaluate, ascending.

  Each species' rows to evaluate are the first of its part of the queue.
  """
  last = 2 * (ROUNDS + 1)
  row = pareto.order(rounds, last)[: len(owners)]
  queue = pareto.order(last * proposer + rounds, last * count)
  return queue, jnp.sort(row)
