"""NSGA-III (Deb and Jain 2014): normalization, niches, survival order."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from nemo_jax.core import checks
from nemo_jax.core.types import Array
from nemo_jax.pareto import sorting
from nemo_jax.pareto.indicators import check_directions


def hyperplane_normalize(
  objectives: Any, ranks: Any, mask: Any = None
) -> Float[Array, 'n M']:
  """Objectives with the ideal point at 0 and the nadir point at 1.

  NSGA-III (Deb and Jain 2014, section IV-C): the nadir comes from the
  intercepts of the plane through the extreme points of the first front. If
  that plane is degenerate, the nadir is the worst of the first front, as in
  pymoo; if that equals the ideal, the worst of all rows. Rows that are masked
  or hold an infinity are +inf.

  Args:
    objectives: [n, M].
    ranks: int32[n], the front of each row, 0 the first.
    mask: bool[n], valid rows; all if absent.

  Raises:
    InputError: shapes or types do not fit.
  """
  objectives, mask = sorting.points(objectives, mask)
  n, m = objectives.shape
  ranks = checks.array('ranks', ranks, 'n', 'whole', n=n)
  if not n:
    return objectives
  objectives = sorting.clean(objectives, mask)
  usable = jnp.all(jnp.isfinite(objectives), axis=-1)
  ideal = jnp.min(objectives, axis=0, where=usable[:, None], initial=jnp.inf)
  ideal = jnp.where(jnp.isfinite(ideal), ideal, 0)
  worst = jnp.max(objectives, axis=0, where=usable[:, None], initial=-jnp.inf)
  first = usable & (ranks == 0)
  front_worst = jnp.max(
    objectives, axis=0, where=first[:, None], initial=-jnp.inf
  )

  # Extreme points: the least achievement scalarisation along each axis (eq. 4).
  shifted = jnp.where(usable[:, None], objectives - ideal, jnp.inf)
  shifted = jnp.where(shifted < 1e-3, 0, shifted)
  weights = jnp.where(jnp.eye(m, dtype=bool), 1, 1e6)
  scalarised = jnp.max(shifted[None] * weights[:, None], axis=-1)
  scalarised = jnp.where(first, scalarised, jnp.inf)
  extremes = objectives[jnp.argmin(scalarised, axis=-1)] - ideal

  plane = jnp.linalg.solve(extremes, jnp.ones(m, objectives.dtype))
  intercepts = 1 / plane
  fits = jnp.all(jnp.abs(extremes @ plane - 1) < 1e-5)
  fits &= jnp.all(intercepts > 1e-6)
  # Where extreme points coincide, a plane may fit by rounding alone.
  scaled = extremes / (worst - ideal)
  scaled /= jnp.linalg.norm(scaled, axis=-1, keepdims=True)
  fits &= jnp.abs(jnp.linalg.det(scaled)) > 1e-5
  nadir = jnp.where(fits, jnp.minimum(ideal + intercepts, worst), front_worst)
  nadir = jnp.where(nadir - ideal <= 1e-6, worst, nadir)
  span = nadir - ideal
  span = jnp.where((span > 0) & jnp.isfinite(span), span, 1e-12)
  return jnp.where(usable[:, None], (objectives - ideal) / span, jnp.inf)


def associate(
  normalized: Any, directions: Any
) -> tuple[Int[Array, ' n'], Float[Array, ' n']]:
  """Nearest direction of each row, and the perpendicular distance to it.

  NSGA-III, algorithm 3. Rows with an infinity get direction 0 and distance
  +inf.

  Args:
    normalized: [n, M], from `hyperplane_normalize`.
    directions: [W, M], for example `reference_directions`.

  Returns:
    int32[n], the index of a direction; and float[n], the distance.

  Raises:
    InputError: shapes or types do not fit, or a direction is negative, zero or
      not finite.
  """
  normalized = checks.array('normalized', normalized, 'nM')
  directions = check_directions('directions', directions, normalized.shape[1])
  usable = jnp.all(jnp.isfinite(normalized), axis=-1)
  rows = jnp.where(usable[:, None], normalized, 0)
  # Scaled so that squares neither overflow nor vanish; a power of two keeps all
  # digits.
  _, power = jnp.frexp(jnp.max(directions, axis=-1, keepdims=True))
  directions = jnp.ldexp(directions, -power)
  unit = directions / jnp.linalg.norm(directions, axis=-1, keepdims=True)
  # The nearest direction is the one on which the projection is the longest. Not
  # a matrix product, which accelerators may compute in reduced precision.
  parts = rows.T[:, :, None] * unit.T[:, None, :]
  niche = jnp.argmax(functools.reduce(jnp.add, parts), axis=-1)
  niche = niche.astype(jnp.int32)
  nearest = unit[niche]
  along = jnp.sum(nearest * rows, axis=-1, keepdims=True)
  distance = jnp.linalg.norm(rows - along * nearest, axis=-1)
  return jnp.where(usable, niche, 0), jnp.where(usable, distance, jnp.inf)


def niching_order(
  key: Array, ranks: Any, niche: Any, distance: Any
) -> Int[Array, ' n']:
  """Row indices, best first, by front and then by niche count; int32.

  NSGA-III, algorithm 4, without its loop. The algorithm gives the next place to
  a member of the niche with the fewest members chosen so far. So the j-th
  member of a niche is chosen after j members of every other niche. A member's
  level is therefore its position within its niche, and the order is by front,
  then level. The first member of an empty niche is the one closest to its
  direction; all other choices are random.

  Args:
    key: random key.
    ranks: int32[n], the front of each row.
    niche: int32[n], from `associate`, as is the next.
    distance: float[n].

  Raises:
    InputError: shapes or types do not fit.
  """
  ranks = checks.array('ranks', ranks, 'n', 'whole')
  n = ranks.shape[0]
  niche = checks.array('niche', niche, 'n', 'whole', n=n)
  distance = checks.array('distance', distance, 'n', n=n)
  if not n:
    return jnp.zeros(0, jnp.int32)
  shuffle, ties = jax.random.uniform(key, (2, n))
  group = niche * (n + 1) + ranks
  closest = jnp.lexsort((shuffle, distance, group))
  starts = jnp.ones(n, bool).at[1:].set(jnp.diff(niche[closest]) != 0)
  head = jnp.zeros(n, bool).at[closest].set(starts)

  within = jnp.lexsort((shuffle, 2 * group + ~head))
  index = jnp.arange(n)
  first = jax.lax.cummax(jnp.where(starts, index, 0))
  level = jnp.zeros(n, index.dtype).at[within].set(index - first)
  return jnp.lexsort((ties, level, ranks))


def nsga3_order(
  key: Array, objectives: Any, directions: Any, mask: Any = None
) -> Int[Array, ' n']:
  """Row indices in the order in which NSGA-III would keep them; int32.

  Deb and Jain 2014: by front, and within a front by niching around the
  reference directions. The first k indices are the survivors of a selection of
  k. Rows that are masked or hold an infinity come last.

  Args:
    key: random key.
    objectives: [n, M].
    directions: [W, M], for example `reference_directions`.
    mask: bool[n], valid rows; all if absent.

  Raises:
    InputError: as for `associate`.
  """
  objectives, mask = sorting.points(objectives, mask)
  objectives = sorting.clean(objectives, mask)
  usable = jnp.all(jnp.isfinite(objectives), axis=-1)
  ranks = sorting.nondominated_rank(objectives, usable)
  normalized = hyperplane_normalize(objectives, ranks, usable)
  niche, distance = associate(normalized, directions)
  return niching_order(key, ranks, niche, distance)
