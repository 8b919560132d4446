"""Metrics of a search: scaled objectives and indicators of the front."""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from nemo_jax import pareto
from nemo_jax.core.types import Array, ArrayLike
from nemo_jax.search.problem import Population, Problem


def scale(
  problem: Problem, objectives: Float[ArrayLike, '... M']
) -> Float[Array, '... M']:
  """Objectives with the ideal point at 0 and the reference point at 1."""
  span = problem.reference - problem.ideal
  return jnp.asarray((objectives - problem.ideal) / span)


def hypervolume(
  problem: Problem,
  objectives: Float[ArrayLike, 'n M'],
  mask: Bool[ArrayLike, ' n'] | None = None,
) -> Float[Array, '']:
  """Hypervolume of the rows up to the reference; the ideal point alone has 1.

  Args:
    problem: for two or three objectives.
    objectives: of each row.
    mask: valid rows; all if absent.
  """
  scaled = scale(problem, objectives)
  return pareto.hypervolume(scaled, jnp.ones(scaled.shape[1]), mask)


def front_metrics(
  problem: Problem,
  archive: Population,
  species: int,
  directions: Float[ArrayLike, 'D M'],
) -> dict[str, Array]:
  """Metrics of an archive: indicators, size, best values and shares of species.

  Args:
    problem: the problem that is searched.
    archive: [A, ...].
    species: S.
    directions: weight vectors of R2.

  Returns:
    `r2`; `front_size`; `best` [M], the least of each objective; `front_share`
    [S], the share of each species in the front; and, for two or three
    objectives, `hypervolume`.
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
