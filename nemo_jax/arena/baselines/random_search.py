"""Random search: independent uniform choices at all nodes."""

import jax
import jax.numpy as jnp

from nemo_jax.arena.baseline import Baseline, Score
from nemo_jax.core.types import Array
from nemo_jax.search.problem import Problem


def search(
  key: Array, problem: Problem, evaluations: int, score: Score
) -> None:
  """Scores configurations drawn uniformly from the allowed choices."""
  logits = jnp.where(problem.allowed, 0.0, -jnp.inf)
  shape = evaluations, logits.shape[0]
  score(jax.random.categorical(key, logits, shape=shape))


BASELINE = Baseline(search)
