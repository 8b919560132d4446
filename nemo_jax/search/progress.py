"""Metrics of a search: scaled objectives, hypervolume, size of the front."""

import jax
import jax.numpy as jnp

from nemo_jax import pareto
from nemo_jax.core.types import Array, ArrayLike
from nemo_jax.search.problem import Population, Problem


def scale(problem: Problem, objectives: Array) -> Array:
  """[..., M]: objectives with the ideal point at 0 and the reference at 1."""
  return (objectives - problem.ideal) / (problem.reference - problem.ideal)


def hypervolume(
  problem: Problem, objectives: Array, mask: Array | None = None
) -> Array:
  """float[]: volume between rows [n, M] and the reference, of at most 1."""
  scaled = scale(problem, objectives)
  return pareto.hypervolume(scaled, jnp.ones(scaled.shape[1]), mask)


def front_metrics(
  problem: Problem, archive: Population, species: int, directions: ArrayLike
) -> dict[str, Array]:
  """Metrics of an archive: its indicators, size, best, and whose points it has.

  Args:
    problem: what is searched.
    archive: [A, ...].
    species: S.
    directions: float32[D, M], of R2.
  """
  filled = jnp.all(jnp.isfinite(archive.objectives), axis=-1)
  scaled = scale(problem, archive.objectives)
  owner = jnp.where(filled, archive.species, species)
  share = jax.ops.segment_sum(filled.astype(jnp.float32), owner, species + 1)
  metrics = {
    'r2': pareto.r2(scaled, directions, jnp.zeros(scaled.shape[1]), filled),
    'front_size': jnp.sum(filled),
    'best': jnp.min(archive.objectives, axis=0),
    'front_share': share[:species] / jnp.maximum(jnp.sum(share), 1),
  }
  if scaled.shape[1] in (2, 3):
    metrics['hypervolume'] = hypervolume(problem, archive.objectives, filled)
  return metrics
