"""Selection of the proposals to evaluate, with or without a surrogate."""

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int, Integer

from nemo_jax import pareto
from nemo_jax.core import checks
from nemo_jax.core.types import Array, InputError, PyTree
from nemo_jax.pareto.archive import Population
from nemo_jax.search import variation
from nemo_jax.search.allocation import place_of
from nemo_jax.search.problem import Ask, Problem, Select, Species, Surrogate

# Most rounds in which a surrogate picks proposals.
ROUNDS = 64
# Most proposals that a surrogate sees; 3 P / 2 if that is larger.
PROPOSALS = 1024


@flax.struct.dataclass
class Asked:
  """Proposals of all species, R rows in all, and which of them to evaluate.

  Attributes:
    choices: int32[P, N], the candidates to evaluate.
    proposer: int32[P], the species of each candidate.
    row: int32[P], the row of `proposed` of each candidate.
    proposed: [R, N], all proposals, those of a species together; in the
      narrowest type, see `narrow`.
    queue: int32[R], the rows of `proposed`, species by species, in order of
      preference.
    counts: number of proposals of each species.
  """

  # Loosely typed: JAX also rebuilds this with other leaves than arrays.
  choices: Any
  proposer: Any
  row: Any
  proposed: Any
  queue: Any
  counts: tuple[int, ...] = flax.struct.field(pytree_node=False)


def starts(counts: Sequence[int]) -> Int[np.ndarray, ' S']:
  """First row of each species, given the number of rows of each."""
  return np.cumsum([0, *counts[:-1]])


def narrow(
  problem: Problem, choices: Integer[Array, 'n N']
) -> Integer[Array, 'n N']:
  """The same choices, in the narrowest unsigned type that holds them."""
  return choices.astype(np.min_scalar_type(problem.allowed.shape[1] - 1))


def _proposals(
  ask: Ask, problem: Problem, key: Array, state: PyTree
) -> tuple[Integer[Array, 'Q N'], PyTree]:
  """Proposals of a species, made allowed and narrow, and its next state."""
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
  """Proposals of all species with the candidates to evaluate, and next states.

  With a surrogate that has `select`, the candidates are those it picks. Without
  one, each species has as many as it has places: its first new proposals, or
  repeated ones where it has too few.

  Args:
    problem: the problem to search; its data are not read.
    key: random key.
    population: [P, ...], sorted by species.
    archive: the non-dominated solutions so far.
    species: S of them.
    states: state of each species.
    surrogate: of the search, or None.
    surrogate_state: its state.

  Raises:
    InputError: what a species proposes is not an array of choices, or has fewer
      than P rows.
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


def _repeated(
  problem: Problem,
  population: Population,
  archive: Population,
  proposed: Integer[Array, 'R N'],
) -> Bool[Array, ' R']:
  """Whether each proposal is in the archive or population, or came before."""
  living = jnp.all(jnp.isfinite(population.objectives), axis=-1)
  archived = jnp.all(jnp.isfinite(archive.objectives), axis=-1)
  rows = [archive.choices, population.choices, proposed]
  known = [archived, living, jnp.ones(len(proposed), bool)]
  repeated = pareto.duplicated(
    jnp.concatenate([narrow(problem, x) for x in rows]), jnp.concatenate(known)
  )
  return repeated[-len(proposed) :]


def _places(population: Population, count: int) -> Int[Array, ' S']:
  """How many proposals of each of S = `count` species may be evaluated."""
  owners = population.species
  places = jax.ops.segment_sum(jnp.ones_like(owners), owners, count)
  living = jnp.all(jnp.isfinite(population.objectives), axis=-1)
  # In the first generation, sizes do not depend on utility yet.
  return jnp.where(jnp.any(living), places, len(owners))


def _rounds(
  key: Array,
  select: Select,
  state: PyTree,
  archive: Population,
  proposed: Integer[Array, 'R N'],
  proposer: Int[Array, ' R'],
  repeated: Bool[Array, ' R'],
  places: Int[Array, ' S'],
  count: int,
) -> Int[Array, ' R']:
  """Round in which each proposal is picked; int32.

  It is ROUNDS for a new proposal that is not picked, and larger for a repeated
  one. So places for which a species has no new proposal go to new proposals of
  other species.
  """
  # If there are too many proposals, the surrogate sees the first new ones of
  # each species.
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
  rounds: Int[Array, ' R'],
  proposer: Int[Array, ' R'],
  owners: Int[Array, ' P'],
  count: int,
) -> tuple[Int[Array, ' R'], Int[Array, ' P']]:
  """The queue, and the rows to evaluate, ascending; see `Asked`.

  The rows to evaluate of a species are the first ones of its part of the queue.
  """
  last = 2 * (ROUNDS + 1)
  row = pareto.order(rounds, last)[: len(owners)]
  queue = pareto.order(last * proposer + rounds, last * count)
  return queue, jnp.sort(row)
