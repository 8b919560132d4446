"""A whole population through `problem.evaluate`."""

import jax

from nemo_jax.base import Array, Problem


def evaluate(
  problem: Problem, choices: Array, batch_size: int | None = None
) -> Array:
  """Objectives [P, M] of `choices` [P, N].

  Args:
    problem: prices one candidate at a time.
    choices: [P, N] int32.
    batch_size: candidates evaluated at once, by `vmap`; one after the other if
      absent, which is what a CPU likes: `vmap` over weights would turn every
      convolution into a grouped one.
  """
  one = lambda candidate: problem.evaluate(problem.data, candidate)
  return jax.lax.map(one, choices, batch_size=batch_size)
