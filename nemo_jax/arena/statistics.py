"""Statistics of fronts and of seeds: hypervolumes, intervals, paired tests."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
import scipy.stats

from nemo_jax import pareto


def hypervolume(values, ideal, reference) -> float:
  """Of rows [n, M], with the ideal point at 0 and the reference at 1."""
  if not len(values):
    return 0.0
  # Few shapes, so few programs.
  padding = -len(values) % 64
  rows = np.pad(values, ((0, padding), (0, 0)), constant_values=np.inf)
  scaled = jnp.asarray((rows - ideal) / (reference - ideal), jnp.float32)
  return float(pareto.hypervolume(scaled, jnp.ones(len(ideal))))


def interval(values: np.ndarray) -> np.ndarray:
  """[...]: half of the 95 % confidence interval of means over [S, ...].

  By Student's t; 0 where there is one value alone.
  """
  if len(values) < 2:
    return np.zeros(values.shape[1:])
  quantile = scipy.stats.t.ppf(0.975, len(values) - 1)
  return quantile * scipy.stats.sem(values, axis=0)


def summarise(results: dict, methods: Sequence[str], seeds: Sequence[str]):
  """Means, intervals, and the first method against each other one, in pairs.

  Args:
    results: {method: {seed: {'volumes': {mark: {score: hypervolume}}}}}.
    methods: which of them; the first is compared with the others.
    seeds: which of them.

  Returns:
    A list with a dictionary for each method, mark and score: `mean` and
    `interval` of the hypervolume; of the differences, pair by pair, `gain`,
    `gain_interval`, `ahead` and `p_value`, by the paired t-test.
  """
  rows = []
  first = results[methods[0]][seeds[0]]['volumes']
  for mark, scores in first.items():
    for score in scores:
      values = {
        m: np.asarray([results[m][s]['volumes'][mark][score] for s in seeds])
        for m in methods
      }
      for method, own in values.items():
        gap = values[methods[0]] - own
        differs = len(gap) > 1 and np.ptp(gap) > 0
        test = scipy.stats.ttest_1samp(gap, 0.0) if differs else None
        rows.append(
          {
            'method': method,
            'evaluations': int(mark),
            'score': score,
            'mean': float(own.mean()),
            'interval': float(interval(own)),
            'gain': float(gap.mean()),
            'gain_interval': float(interval(gap)),
            'ahead': int((gap > 0).sum()),
            'seeds': len(seeds),
            'p_value': None if test is None else float(test.pvalue),
          }
        )
  return rows


def attainment(
  fronts: Sequence[np.ndarray], grid: np.ndarray, cost: int, share: float = 0.5
) -> np.ndarray:
  """[G]: what a share of the runs attain at costs of at most `grid` [G].

  The empirical attainment function of two objectives (Fonseca et al. 2001),
  read at that share: the median for one half.

  Args:
    fronts: of every run, objectives [n, M], performance first.
    grid: costs.
    cost: which objective they are of.
    share: of the runs.
  """
  best = []
  for front in fronts:
    within = front[:, cost][None] <= grid[:, None]
    values = np.where(within, front[:, 0][None], np.inf)
    best.append(values.min(axis=1, initial=np.inf))
  ranked = np.sort(np.stack(best), axis=0)
  return ranked[int(np.ceil(share * len(ranked))) - 1]
