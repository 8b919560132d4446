"""NSGA-II (Deb et al. 2002) on vectors that are rounded to choices."""

import functools

import jax
import jax.numpy as jnp

from nemo_jax import pareto
from nemo_jax.arena.baseline import Baseline
from nemo_jax.search import variation

# Children made for each one that is evaluated, of which new ones go first.
BROODS = 8


@functools.partial(jax.jit, static_argnames='etas')
def _breed(key, parents, place, allowed, etas):
  """int32[P, N]: offspring of binary tournaments, unlike all others if may be.

  Args:
    key: random key.
    parents: int32[P, N].
    place: [P], where each stands in the order of survival.
    allowed: bool[N, K].
    etas: distribution indices of crossover and mutation; with NSGA-II's usual
      20 a mutation would rarely reach another whole number.
  """
  keys = jax.random.split(key, 5)
  top, everyone = allowed.shape[1] - 1.0, jnp.ones(len(parents), bool)

  def pick(key):
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
def _survivors(objectives):
  """int32[n]: rows in the order in which NSGA-II would keep them."""
  ranks = pareto.nondominated_rank(objectives)
  # A repeated row adds nothing.
  ranks += len(ranks) * pareto.duplicated(objectives)
  crowding = pareto.crowding_distance(objectives, ranks)
  return jnp.lexsort((-crowding, ranks))


def search(
  key,
  problem,
  evaluations,
  score,
  population: int = 50,
  etas: tuple[float, float] = (15.0, 3.0),
) -> None:
  """A search that starts blind.

  Args:
    key: random key.
    problem: what is searched.
    evaluations: how many it has.
    score: see `baseline.Search`.
    population: configurations that live on.
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
