"""What each point of a set alone adds to its hypervolume."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nemo_jax.core.types import Array
from nemo_jax.pareto import sorting


class _Columns(NamedTuple):
  """Strips of the first objective, and what points reach over them so far.

  Strips lie between neighbouring places of the first objective. A point
  reaches over all that begin at its own place or later.
  """

  most: Array  # [n], the largest depth that is reached
  next: Array  # [n], the second largest
  owner: Array  # int32[n], which point reaches furthest; n where none does
  area: Array  # [n], covered by the owner alone since it owns the strip
  volume: Array  # [n + 1], of each point, what has been added up


def exclusive_volumes(points: Array, reference: Array) -> Array:
  """float[n]: the volume up to `reference [M]` that each point alone dominates.

  Two or three objectives. Points enter in order of the last objective. Over
  each strip of the first one, the depths of the best two points say what the
  best covers alone. Time O(n^2), memory O(n).

  Args:
    points: [n, M], in a box of about unit size; a row that is at the
      reference in one objective is at it in all.
    reference: [M].
  """
  n = len(points)
  if points.shape[1] == 2:
    points = jnp.pad(points, ((0, 0), (0, 1)))
    # The rows at the reference stay there.
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
  nobody = jnp.full(n, n, jnp.int32)
  start = _Columns(zeros, zeros, nobody, zeros, jnp.append(zeros, 0))
  # The rows at the reference come last, and cover nothing.
  count = jnp.sum(entering[:, 2] < reference[2])
  last = jax.lax.fori_loop(0, count, enter, start)
  volume = last.volume.at[last.owner].add(width * last.area)
  return jnp.zeros_like(zeros).at[by_height].set(volume[:n])


def _settle(columns: _Columns, taken: Array, first: Array, width: Array):
  """Volumes [n + 1], once owners were paid for the strips that are taken.

  These lie together, and so do those of one owner; that makes few sums, where
  to scatter all strips would take three times as long.
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
