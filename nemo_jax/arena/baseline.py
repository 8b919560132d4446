"""What a baseline is: a way to search that NEMO is measured against."""

from typing import NamedTuple, Protocol

import numpy as np

from nemo_jax.core.types import Array, ArrayLike
from nemo_jax.search.problem import Problem


class Score(Protocol):
  """Evaluates configurations, counts them, and keeps what is worth keeping."""

  def __call__(self, choices: ArrayLike) -> np.ndarray:
    """Returns float32[n, M] objectives of `choices` int32[n, N]."""


class Search(Protocol):
  """A search within a number of evaluations; `score` keeps what it finds."""

  def __call__(
    self, key: Array, problem: Problem, evaluations: int, score: Score
  ) -> None:
    """Scores configurations of a problem, at most so many.

    Args:
      key: random key.
      problem: what is searched.
      evaluations: how many configurations may be scored.
      score: scores them.
    """


class Baseline(NamedTuple):
  """A baseline; every baseline file has one, `BASELINE`.

  Attributes:
    search: see `Search`.
    needs_prior: whether it reads the problem's prior, which costs evaluations
      too.
  """

  search: Search
  needs_prior: bool = False
