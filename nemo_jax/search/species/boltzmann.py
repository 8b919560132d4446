"""Boltzmann chromosomes: a distribution over the choices of each node."""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from nemo_jax.core.types import Array
from nemo_jax.search import blocks, variation
from nemo_jax.search.problem import Problem, Species, SpeciesBuilder


class Genotype(NamedTuple):
  """Choice ~ softmax(prior / temperature), independently at every node."""

  prior: Float[Array, 'P N K']
  log_temperature: Float[Array, 'P N']


class State(NamedTuple):
  """Parents, one for each row of the population, and the last offspring."""

  parents: Genotype
  offspring: Genotype
  rank: Float[Array, ' P']  # +inf in rows of other species
  own: Bool[Array, ' P']  # the rows of this species
  migrants: Int[Array, 'P N']  # choices of the whole population
  migrant_rank: Float[Array, ' P']  # of the whole population


def _sample(key: Array, logits: Float[Array, '*s K']) -> Int[Array, ' *s']:
  """Random choices with the probabilities softmax(logits); int32."""
  chance = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
  # Not `cumsum`, which XLA does not fuse with other operations.
  sums = list(itertools.accumulate(jnp.moveaxis(chance, -1, 0)))
  # Less than 1, so that rounding cannot give an index beyond the last choice.
  draw = jax.random.uniform(key, logits.shape[:-1], maxval=1 - 1e-6)
  draw *= sums[-1]
  return sum((below <= draw).astype(jnp.int32) for below in sums)


def make(
  problem: Problem,
  population_size: int,
  crossover_rate: float = 0.5,
  migrant_rate: float = 0.3,
  std: float = 1.0,
) -> Species:
  """Species of distributions; each offspring is sampled from its own.

  The Boltzmann chromosomes of EGRL (arXiv 2007.07298). As there, chromosomes
  are also seeded from solutions of other species: the first parent may be a
  migrant, a member of the whole population. Its chromosome is the distribution
  whose samples differ from the migrant at about two nodes. The rates are not
  in the paper.

  Args:
    problem: the problem to search.
    population_size: P.
    crossover_rate: share of the offspring that have two parents.
    migrant_rate: share of the offspring whose first parent is a migrant.
    std: of the noise on a mutated node's priors.
  """
  nodes, choices = problem.allowed.shape
  number, size = blocks.divide(population_size)
  count = number * size
  # With this prior at temperature 1, a node keeps its choice with a probability
  # such that about two nodes of the graph change.
  stay = 1 - min(2 / nodes, 0.5)
  peak = jnp.log(stay / (1 - stay) * max(choices - 1, 1))

  def fresh(key, count):
    prior = jax.random.normal(key, (count, nodes, choices), jnp.float32)
    return Genotype(prior, jnp.zeros((count, nodes), jnp.float32))

  def init(key):
    return State(
      parents=fresh(key, population_size),
      offspring=fresh(key, count),
      rank=jnp.full(population_size, jnp.inf, jnp.float32),
      own=jnp.ones(population_size, bool),
      migrants=jnp.zeros((population_size, nodes), jnp.int32),
      migrant_rank=jnp.full(population_size, jnp.inf, jnp.float32),
    )

  def cross(key, rate, one, two):
    """Uniform crossover of nodes in a share `rate` of the offspring."""
    key_row, key_node = jax.random.split(key)
    rows = jax.random.bernoulli(key_row, rate, (size, 1))
    taken = rows & variation.coins(key_node, (size, nodes))
    return Genotype(
      jnp.where(taken[..., None], two.prior, one.prior),
      jnp.where(taken, two.log_temperature, one.log_temperature),
    )

  def mutate(key, genotype):
    key_where, key_prior, key_heat = jax.random.split(key, 3)
    where = jax.random.bernoulli(key_where, 1 / nodes, (size, nodes))
    # One draw for each chromosome, because few of its nodes are mutated.
    noise = std * jax.random.normal(key_prior, (size, 1, choices))
    heat = 0.2 * jax.random.normal(key_heat, (size, 1))
    return Genotype(
      genotype.prior + jnp.where(where[..., None], noise, 0),
      jnp.clip(genotype.log_temperature + jnp.where(where, heat, 0), -3, 3),
    )

  def propose(state, key):
    keys = jax.random.split(key, 7)
    win = functools.partial(variation.tournament, count=size)
    one, two = (win(k, state.rank, state.own) for k in keys[:2])
    first = jax.tree.map(lambda x: x[one], state.parents)
    second = jax.tree.map(lambda x: x[two], state.parents)
    known = jnp.isfinite(state.migrant_rank)
    migrant = state.migrants[win(keys[2], state.migrant_rank, known)]
    invited = jax.random.bernoulli(keys[3], migrant_rate, (size,))
    invited &= jnp.any(known)
    first = Genotype(
      jnp.where(
        invited[:, None, None],
        peak * jax.nn.one_hot(migrant, choices),
        first.prior,
      ),
      jnp.where(invited[:, None], 0.0, first.log_temperature),
    )
    child = mutate(keys[4], cross(keys[5], crossover_rate, first, second))
    logits = child.prior / jnp.exp(child.log_temperature)[..., None]
    logits = jnp.where(problem.allowed, logits, -jnp.inf)
    return _sample(keys[6], logits), child

  def tell(key, state, feedback):
    del key
    parents = variation.survivors(
      state.parents, state.offspring, feedback.source
    )
    return state._replace(
      parents=parents,
      rank=jnp.where(feedback.own, feedback.rank, jnp.inf),
      own=feedback.own,
      migrants=feedback.population.choices,
      migrant_rank=feedback.rank,
    )

  return Species(
    init=init,
    tell=tell,
    **blocks.asks(propose, number),
  )


BUILDER = SpeciesBuilder(make)
