"""Selection of the best point of a front within limits."""

import dataclasses
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from nemo_jax.core.types import InputError
from nemo_jax.runs.point import Point

# Objectives that are one minus an accuracy.
ERRORS = ('top1_error', 'top5_error')


class _Limit(NamedTuple):
  """A limit, with the values of n points and their relative excesses."""

  name: str
  unit: str
  limit: float
  values: Float[np.ndarray, ' n']
  excess: Float[
    np.ndarray, ' n'
  ]  # as a share of the limit; 0 or less is within

  def words(self, index: int) -> str:
    """Message with the value of a point, and the limit."""
    value, limit = abs(self.values[index]), abs(self.limit)
    return f'{value:.4g} {self.unit}, not {limit:.4g} ({self.name})'


def _limit(name: str, unit: str, values: np.ndarray, limit: float) -> _Limit:
  """A limit on values [n]."""
  excess = (values - limit) / max(abs(limit), 1e-12)
  # With a tolerance for rounding in the values.
  return _Limit(name, unit, limit, values, np.where(excess < 1e-9, 0, excess))


def _values(points: Sequence[Point], name: str) -> Float[np.ndarray, ' n']:
  """Values of an attribute of n points.

  Raises:
    InputError: a point lacks it, as in older files.
  """
  values = [getattr(point, name) for point in points]
  if None in values:
    raise InputError(
      f'the points of this front have no {name}: it was written by an older '
      'version'
    )
  return np.asarray(values, float)


def _limits(
  points: Sequence[Point],
  first_objective: str,
  size_mb: float | None,
  gbitops: float | None,
  performance: float | None,
) -> list[_Limit]:
  """The given limits, with the values of all points."""
  if not points:
    raise InputError('the front has no point to select from')
  if not all(point.objectives for point in points):
    raise InputError('the points of this front have no objectives')
  found = []
  for name, unit, limit in (
    ('size_mb', 'MB', size_mb),
    ('gbitops', 'G bit-operations', gbitops),
  ):
    if limit is None:
      continue
    if not 0 <= limit < np.inf:
      raise InputError(f'max_{name} is {limit}; give a number from 0')
    found.append(_limit(f'max_{name}', unit, _values(points, name), limit))
  if performance is not None:
    if first_objective not in ERRORS:
      raise InputError(
        f'min_performance needs an error as first objective, of '
        f'{", ".join(ERRORS)}; this front has {first_objective}'
      )
    if not 0 <= performance <= 1:
      raise InputError(
        f'min_performance is {performance}; give an accuracy from 0 to 1'
      )
    values = 1 - np.asarray([p.objectives[0] for p in points], float)
    # Negative, since this limit is a lower bound.
    found.append(_limit('min_performance', 'accuracy', -values, -performance))
  if not found:
    raise InputError(
      'give a limit: max_size_mb, max_gbitops or min_performance'
    )
  return found


def select(
  points: Sequence[Point],
  first_objective: str,
  *,
  max_size_mb: float | None,
  max_gbitops: float | None,
  min_performance: float | None,
) -> Point:
  """The best point within limits; see `Front.select`.

  Args:
    points: of a front.
    first_objective: name of the first objective.
    max_size_mb: millions of bytes of the whole model.
    max_gbitops: 10^9 BitOps of one input.
    min_performance: accuracy on the images of the search, from 0 to 1.

  Raises:
    InputError: there is no point, no limit is given, or the points lack the
      values that a limit needs.
  """
  limits = _limits(
    points, first_objective, max_size_mb, max_gbitops, min_performance
  )
  excess = np.stack([limit.excess for limit in limits])
  within = np.all(excess <= 0, axis=0)
  if min_performance is None:
    order = np.asarray([p.objectives[0] for p in points], float)
  else:
    order = _values(points, 'size_mb')
  if np.any(within):
    return points[int(np.argmin(np.where(within, order, np.inf)))]
  worst = np.sum(np.maximum(excess, 0), axis=0)
  index = int(np.lexsort((order, worst))[0])
  missed = tuple(x.words(index) for x in limits if x.excess[index] > 0)
  warnings.warn(
    f'no point is within the limits; the nearest has {" and ".join(missed)}',
    stacklevel=3,
  )
  return dataclasses.replace(points[index], shortfall=missed)
