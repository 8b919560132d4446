"""Greedy one-shot front: the least sensitive choices first, as in AIMET.

AIMET's automatic mixed precision measures the loss of every narrower choice of
every quantizer by itself, and sorts these steps by their loss. From the widest
configuration it takes one step after the other; each configuration on the way
is a point of its front.
"""

import jax
import numpy as np
from jaxtyping import Int

from nemo_jax.arena.baseline import Baseline, Score
from nemo_jax.core.types import Array
from nemo_jax.search import prior as prior_lib
from nemo_jax.search.problem import Problem


def stages(problem: Problem) -> Int[np.ndarray, 'n N']:
  """The configurations on the way, from expensive to cheap, int32."""
  known = prior_lib.of(problem)
  nodes, choices = problem.allowed.shape
  allowed = np.asarray(problem.allowed)
  loss = np.asarray(known.loss)
  widest = choices - 1 - np.argmax(allowed[:, ::-1], axis=1)
  steps = [
    (loss[n, k], -k, n)
    for n in range(nodes)
    for k in np.flatnonzero(allowed[n])
    if k < widest[n]
  ]
  rows = [widest]
  for _, negative, node in sorted(steps):
    # Else a narrower choice with a smaller loss was taken before.
    if -negative < rows[-1][node]:
      row = rows[-1].copy()
      row[node] = -negative
      rows.append(row)
  return np.stack(rows).astype(np.int32)


def search(
  key: Array, problem: Problem, evaluations: int, score: Score
) -> None:
  """Scores the stages in random order, at most `evaluations`; see `Search`."""
  rows = stages(problem)
  order = jax.random.permutation(key, len(rows))[:evaluations]
  score(rows[np.asarray(order)])


BASELINE = Baseline(search, needs_prior=True)
