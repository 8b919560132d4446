"""Every node at random, every time."""

import jax
import jax.numpy as jnp

from nemo_jax.arena.baseline import Baseline


def search(key, problem, evaluations, score) -> None:
  """Configurations drawn uniformly among what is allowed."""
  logits = jnp.where(problem.allowed, 0.0, -jnp.inf)
  shape = evaluations, logits.shape[0]
  score(jax.random.categorical(key, logits, shape=shape))


BASELINE = Baseline(search)
