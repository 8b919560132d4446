"""`Point`: a configuration of a front."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
  """A configuration of bit-widths, with its objectives and scores.

  Attributes:
    bits: [N], the bit-width of each quantizer.
    objectives: [M], in the order of `Front.objective_names`; None where not
      finite.
    test_accuracy: top-1 accuracy on the test images, from 0 to 1; None if it
      was not measured.
    test_top5_accuracy: top-5 accuracy on the test images.
    species: name of the species that found it.
    size_mb: millions of bytes of the whole model.
    gbitops: 10^9 BitOps of one input.
    shortfall: messages on the limits of `Front.select` that it exceeds.
  """

  bits: tuple[int, ...] = ()
  objectives: tuple[float | None, ...] = ()
  test_accuracy: float | None = None
  test_top5_accuracy: float | None = None
  species: str | None = None
  size_mb: float | None = None
  gbitops: float | None = None
  shortfall: tuple[str, ...] = ()


def objectives_of(points: Sequence[Point]) -> Float[np.ndarray, '...']:
  """Objectives [n, M] of n points, NaN where not finite; [0] if n is 0."""
  return np.asarray([p.objectives for p in points], float)
