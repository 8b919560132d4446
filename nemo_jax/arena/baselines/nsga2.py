"""NSGA-II (Deb et al. 2002) on real vectors that are rounded to choices."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from nemo_jax import pareto
from nemo_jax.arena.baseline import Baseline, Score
from nemo_jax.core.types import Array
from nemo_jax.search import variation
from nemo_jax.search.problem import Problem

# Offspring made for each that is evaluated; those that are new are preferred.
BROODS = 8


@functools.partial(jax.jit, static_argnames='etas')
def _breed(
  key: Array,
  parents: Int[Array, 'P N'],
  place: Int[Array, ' P'],
  allowed: Bool[Array, 'N K'],
  etas: tuple[float, float],
) -> Int[Array, 'P N']:
  """Offspring of binary tournaments; copies only if there are too few others.

  Args:
    key: random key.
    parents: choices.
    place: position of each parent in the order of survival.
    allowed: choices that nodes allow.
    etas: see `search`.
  """
  keys = jax.random.split(key, 5)
  top, everyone = allowed.shape[1] - 1.0, jnp.ones(len(parents), bool)

  def pick(key: Array) -> Array:
    draw = lambda k: variation.tournament(k, place, everyone)
    rows = jax.vmap(draw)(jax.random.split(key, BROODS)).ravel()
    return parents[rows].astype(jnp.float32)

  one, two = pick(keys[0]), pick(keys[1])
  child = variation.sbx(keys[2], one, two, 0.0, top, etas[0])
  crossed = jax.random.bernoulli(keys[3], 0.9, (len(child), 1))
  child = jnp.where(crossed, child, one)
  child = variation.polynomial_mutation(keys[4], child, 0.0, top, etas[1])
  whole = jnp.round(child).astype(jnp.int32)
  choices = variation.nearest_allowed(whole, allowed)
  repeated = pareto.duplicated(jnp.concatenate([parents, choices]))
  order = jnp.argsort(repeated[len(parents) :], stable=True)
  return choices[order[: len(parents)]]


@jax.jit
def _survivors(objectives: Float[Array, 'n M']) -> Int[Array, ' n']:
  """Indices of the rows in NSGA-II's order of survival, the best first."""
  ranks = pareto.nondominated_rank(objectives)
  # Repeated rows come last.
  ranks += len(ranks) * pareto.duplicated(objectives)
  crowding = pareto.crowding_distance(objectives, ranks)
  return jnp.lexsort((-crowding, ranks))


def search(
  key: Array,
  problem: Problem,
  evaluations: int,
  score: Score,
  population: int = 50,
  etas: tuple[float, float] = (15.0, 3.0),
) -> None:
  """Searches from random configurations, without sensitivities.

  Args:
    key: random key.
    problem: that is searched.
    evaluations: budget.
    score: see `baseline.Search`.
    population: number of survivors.
    etas: distribution indices of crossover and mutation; with NSGA-II's usual
      20 a mutation would rarely reach another whole number.
  """
  population = min(population, evaluations)
  allowed = jnp.asarray(problem.allowed)
  start_key, run_key = jax.random.split(key)
  logits = jnp.where(allowed, 0.0, -jnp.inf)
  shape = population, len(allowed)
  parents = jax.random.categorical(start_key, logits, shape=shape)
  objectives, done = score(parents), population
  while done < evaluations:
    place = jnp.argsort(_survivors(objectives))
    step = jax.random.fold_in(run_key, done)
    count = min(population, evaluations - done)
    child = _breed(step, parents, place, allowed, etas)[:count]
    pool = jnp.concatenate([parents, child])
    values = jnp.concatenate([objectives, score(child)])
    done += count
    kept = _survivors(values)[:population]
    parents, objectives = pool[kept], values[kept]


BASELINE = Baseline(search)
