"""Hypervolume contributions: the volume that each point alone dominates."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from nemo_jax.core.types import Array
from nemo_jax.pareto import sorting


class _Columns(NamedTuple):
  """State of the sweep: strips of the first objective, and point volumes.

  A strip lies between two neighbouring values of the first objective. A point
  covers the strips that begin at its own value or later, each up to the
  point's depth: its distance from the reference in the second objective.
  """

  most: Float[Array, ' n']  # the largest depth in each strip
  next: Float[Array, ' n']  # the second largest
  owner: Int[Array, ' n']  # int32, the point with the largest; n if none
  area: Float[Array, ' n']  # dominated by the owner alone, since it is owner
  volume: Float[Array, ' n+1']  # of each point, the sum so far


def exclusive_volumes(
  points: Float[Array, 'n M'], reference: Float[Array, ' M']
) -> Float[Array, ' n']:
  """Hypervolume contribution of each point, for two or three objectives.

  A sweep: points enter in order of the last objective. In each strip of the
  first objective, the difference between the two largest depths is what the
  deepest point dominates alone. Time O(n^2), memory O(n).

  Args:
    points: in a box of about unit size. A row that equals the reference in one
      objective equals it in all.
    reference: the reference point.
  """
  n = len(points)
  if points.shape[1] == 2:
    points = jnp.pad(points, ((0, 0), (0, 1)))
    # Rows at the reference stay there in the added objective.
    outside = points[:, 0] >= reference[0]
    points = points.at[:, 2].set(outside.astype(points.dtype))
    reference = jnp.append(reference, 1)
  by_height = sorting.lexsort(sorting.sort_keys(points[:, -1:]))
  places = sorting.sort(points[:, 0])
  width = jnp.diff(places, append=reference[0])
  entering = points[by_height]
  strips = jnp.arange(n)

  depth = reference[1] - entering[:, 1]
  height = jnp.diff(entering[:, 2], append=reference[2])
  first = jnp.searchsorted(places, entering[:, 0])

  def enter(point, columns):
    over = strips >= first[point]
    taken = over & (depth[point] > columns.most)
    volume = _settle(columns, taken, first[point], width)
    second = jnp.maximum(columns.next, depth[point])
    second = jnp.where(over, second, columns.next)
    second = jnp.where(taken, columns.most, second)
    most = jnp.where(taken, depth[point], columns.most)
    area = jnp.where(taken, 0, columns.area) + height[point] * (most - second)
    owner = jnp.where(taken, point, columns.owner)
    return _Columns(most, second, owner, area, volume)

  zeros = jnp.zeros(n, points.dtype)
  no_owner = jnp.full(n, n, jnp.int32)
  start = _Columns(zeros, zeros, no_owner, zeros, jnp.append(zeros, 0))
  # The rows at the reference come last, and dominate nothing.
  count = jnp.sum(entering[:, 2] < reference[2])
  last = jax.lax.fori_loop(0, count, enter, start)
  volume = last.volume.at[last.owner].add(width * last.area)
  return jnp.zeros_like(zeros).at[by_height].set(volume[:n])


def _settle(
  columns: _Columns,
  taken: Bool[Array, ' n'],
  first: Int[Array, ''],
  width: Float[Array, ' n'],
) -> Float[Array, ' n+1']:
  """Volumes of the points, with the areas of the taken strips added.

  The taken strips are contiguous, and so are those of one owner. Few sums are
  then needed; a scatter over all strips would take three times as long.

  Args:
    columns: the state of the sweep.
    taken: the strips that get a new owner.
    first: the first of them.
    width: of the strips.
  """
  after = jnp.arange(1, len(taken) + 1)
  end = jnp.max(jnp.where(taken, after, 0))
  covered = width * columns.area

  def pay(state):
    strip, volume = state
    owner = columns.owner[strip]
    lost = taken & (columns.owner == owner)
    volume = volume.at[owner].add(jnp.sum(jnp.where(lost, covered, 0)))
    return jnp.max(jnp.where(lost, after, 0)), volume

  unpaid = lambda state: state[0] < end
  return jax.lax.while_loop(unpaid, pay, (first, columns.volume))[1]
