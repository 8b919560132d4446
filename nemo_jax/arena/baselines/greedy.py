"""One-shot greedy: the least sensitive choices first, as AIMET does it.

AIMET's automatic mixed precision measures every quantizer at every candidate
alone, sorts all of these steps by what they lose, and takes one after the other
from the widest configuration; each stage is a point of its front.
"""

import jax
import numpy as np

from nemo_jax.arena.baseline import Baseline
from nemo_jax.search import prior as prior_lib


def stages(problem) -> np.ndarray:
  """int32[S, N]: every configuration on the way, from dear to cheap."""
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
    # A narrower choice that lost less was taken before.
    if -negative < rows[-1][node]:
      row = rows[-1].copy()
      row[node] = -negative
      rows.append(row)
  return np.stack(rows).astype(np.int32)


def search(key, problem, evaluations, score) -> None:
  """The stages in random order, or as many as there are evaluations for."""
  rows = stages(problem)
  order = jax.random.permutation(key, len(rows))[:evaluations]
  score(rows[np.asarray(order)])


BASELINE = Baseline(search, needs_prior=True)
