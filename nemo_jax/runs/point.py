"""`Point`: one configuration of a front."""

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
  """A configuration, and what it is worth.

  Attributes:
    bits: of each quantizer.
    objectives: in the order of the front's names; None where not finite.
    test_accuracy: top-1, on images that no search has seen; None if not scored.
    test_top5_accuracy: likewise.
    species: which species found it.
    size_mb: millions of bytes of the whole model.
    gbitops: 10^9 bit-operations of one input.
    shortfall: limits of `Front.select` that it misses, in words.
  """

  bits: tuple[int, ...] = ()
  objectives: tuple[float | None, ...] = ()
  test_accuracy: float | None = None
  test_top5_accuracy: float | None = None
  species: str | None = None
  size_mb: float | None = None
  gbitops: float | None = None
  shortfall: tuple[str, ...] = ()


def objectives_of(points: Sequence[Point]) -> np.ndarray:
  """float[n, M]: objectives of points, NaN where they are not finite."""
  return np.asarray([p.objectives for p in points], float)
