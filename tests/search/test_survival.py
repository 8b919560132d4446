"""Who lives on, and what species are told of it, against a loop in Python."""

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np

from nemo_jax.search import survival
from nemo_jax.search.problem import Population
from nemo_jax.search.screening import Asked, starts

PLACES, NODES, OBJECTIVES = 8, 4, 2
# Proposals of each species.
COUNTS = (8, 11, 9)
SPECIES = len(COUNTS)
FIRST = starts(COUNTS)
survive = jax.jit(survival.survive)
feedback = jax.jit(survival.feedback)
seeds = st.integers(0, 2**31 - 1)


def draw_sizes(rng) -> np.ndarray:
  """int32[S], none below two."""
  free = np.full(SPECIES, 1 / SPECIES)
  return 2 + rng.multinomial(PLACES - 2 * SPECIES, free).astype(np.int32)


def draw_asked(rng) -> Asked:
  """Some proposals of each species, of which the first in line are asked."""
  queue = np.concatenate(
    [
      start + rng.permutation(count)
      for start, count in zip(FIRST, COUNTS, strict=True)
    ]
  ).astype(np.int32)
  evaluated = rng.multinomial(PLACES, np.full(SPECIES, 1 / SPECIES))
  row = np.sort(
    np.concatenate(
      [
        queue[start : start + count]
        for start, count in zip(FIRST, evaluated, strict=True)
      ]
    )
  )
  proposed = rng.integers(0, 4, (sum(COUNTS), NODES)).astype(np.uint8)
  proposer = np.repeat(np.arange(SPECIES, dtype=np.int32), COUNTS)
  choices = proposed[row].astype(np.int32)
  return Asked(choices, proposer[row], row, proposed, queue, COUNTS)


def draw_case(seed):
  """Ranks of parents and of what was asked, both as a pool, and sizes."""
  rng = np.random.default_rng(seed)
  asked = draw_asked(rng)
  owners = np.repeat(np.arange(SPECIES, dtype=np.int32), draw_sizes(rng))
  rank = rng.permutation(2 * PLACES).astype(np.float32)
  rank[rng.random(2 * PLACES) < rng.random()] = np.inf
  parents = rng.integers(0, 4, (PLACES, NODES)).astype(np.int32)
  objectives = rng.random((2 * PLACES, OBJECTIVES)).astype(np.float32)
  pool = Population(
    np.concatenate([parents, asked.choices]),
    np.where(np.isinf(rank)[:, None], np.float32(np.inf), objectives),
    np.concatenate([owners, asked.proposer]),
  )
  return rank, pool, asked, draw_sizes(rng)


def by_hand(rank, pool, asked, sizes):
  """The same place after place: choices, objectives, species, rank, source."""
  rows = []
  for i, size in enumerate(sizes):
    members = np.flatnonzero((pool.species == i) & np.isfinite(rank))
    members = members[np.argsort(rank[members])][:size]
    for row in members:
      source = row
      if row >= PLACES:
        source = PLACES + asked.row[row - PLACES] - FIRST[i]
      rows.append(
        (pool.choices[row], pool.objectives[row], i, rank[row], source)
      )
    # The first of those that were not asked.
    queue = asked.queue[FIRST[i] : FIRST[i] + COUNTS[i]]
    spare = queue[np.sum(asked.proposer == i) :]
    for k in range(size - len(members)):
      row = spare[k] if k < len(spare) else queue[-1]
      none = np.full(OBJECTIVES, np.inf)
      source = PLACES + row - FIRST[i]
      rows.append((asked.proposed[row], none, i, np.inf, source))
  return [np.stack(column) for column in zip(*rows, strict=True)]


@hypothesis.given(seeds)
def test_each_species_fills_its_places_with_its_own_best(seed):
  case = draw_case(seed)
  population, kept_rank, source = survive(*case)
  found = (*population, kept_rank, source)
  for ours, expected in zip(found, by_hand(*case), strict=True):
    np.testing.assert_array_equal(ours, expected)
  assert population.choices.dtype == source.dtype == np.int32


@hypothesis.given(seeds)
def test_species_are_told_of_their_own_proposals(seed):
  rank, pool, asked, sizes = draw_case(seed)
  population, kept_rank, source = survive(rank, pool, asked, sizes)
  told = feedback(population, kept_rank, source, asked, rank[PLACES:], {'a': 1})
  assert len(told) == SPECIES
  for i, one in enumerate(told):
    jax.tree.map(np.testing.assert_array_equal, one.population, population)
    np.testing.assert_array_equal(one.rank, kept_rank)
    np.testing.assert_array_equal(one.own, population.species == i)
    np.testing.assert_array_equal(one.source, source)
    assert one.learned == {'a': 1}
    fitness = np.full(COUNTS[i], np.inf)
    for place in np.flatnonzero(asked.proposer == i):
      fitness[asked.row[place] - FIRST[i]] = rank[PLACES + place]
    np.testing.assert_array_equal(one.fitness, fitness)
