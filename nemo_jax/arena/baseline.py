"""`Baseline`: a search method that NEMO is compared with."""

from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Float, Int

from nemo_jax.core.types import Array, ArrayLike
from nemo_jax.search.problem import Problem


class Score(Protocol):
  """Evaluates configurations; counts and archives them (`Ledger.score`)."""

  def __call__(
    self, choices: Int[ArrayLike, 'n N']
  ) -> Float[np.ndarray, 'n M']:
    """Returns the objectives of configurations, float32."""


class Search(Protocol):
  """A search with a budget; `score` archives what it finds."""

  def __call__(
    self, key: Array, problem: Problem, evaluations: int, score: Score
  ) -> None:
    """Scores at most `evaluations` configurations of a problem.

    Args:
      key: random key.
      problem: that is searched.
      evaluations: budget.
      score: evaluates configurations.
    """


class Baseline(NamedTuple):
  """A baseline; every baseline file defines one, `BASELINE`.

  Attributes:
    search: see `Search`.
    needs_prior: whether it uses the problem's sensitivities, whose cost is then
      part of its budget.
  """

  search: Search
  needs_prior: bool = False
