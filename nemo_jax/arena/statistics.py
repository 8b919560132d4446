"""Statistics of fronts over seeds: hypervolume, intervals, paired tests."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import scipy.stats
from jaxtyping import Float

from nemo_jax import pareto


def hypervolume(
  values: Float[np.ndarray, 'n M'],
  ideal: Float[np.ndarray, ' M'],
  reference: Float[np.ndarray, ' M'],
) -> float:
  """Hypervolume of a front, as a share of the box from ideal to reference.

  Args:
    values: objectives.
    ideal: point that is scaled to 0.
    reference: point that is scaled to 1.
  """
  if not len(values):
    return 0.0
  # Padded to few shapes, so that few programs are compiled.
  padding = -len(values) % 64
  rows = np.pad(values, ((0, padding), (0, 0)), constant_values=np.inf)
  scaled = jnp.asarray((rows - ideal) / (reference - ideal), jnp.float32)
  return float(pareto.hypervolume(scaled, jnp.ones(len(ideal))))


def interval(values: Float[np.ndarray, 'n ...']) -> Float[np.ndarray, '...']:
  """Half-width of the 95 % confidence interval of the mean over the first axis.

  By Student's t; 0 if there is only one value.
  """
  if len(values) < 2:
    return np.zeros(values.shape[1:])
  quantile = scipy.stats.t.ppf(0.975, len(values) - 1)
  return quantile * scipy.stats.sem(values, axis=0)


def summarise(
  results: Mapping[str, Mapping[str, Mapping[str, Any]]],
  methods: Sequence[str],
  seeds: Sequence[str],
) -> list[dict[str, Any]]:
  """Means of hypervolumes, and paired comparisons with the first method.

  Args:
    results: {method: {seed: {'volumes': {mark: {score: hypervolume}}}}}.
    methods: those that are summarised; the first is compared with the others.
    seeds: those that are summarised.

  Returns:
    A dictionary for each method, number of evaluations and score. `mean` and
    `interval` are of the hypervolume over seeds. `gain` and `gain_interval` are
    of the difference of the first method to this one, seed by seed; `ahead` is
    the number of seeds on which it is positive, and `p_value` is that of the
    paired t-test, None if there is no difference or only one seed.
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
  fronts: Sequence[np.ndarray],
  grid: Float[np.ndarray, ' G'],
  cost: int,
  share: float = 0.5,
) -> Float[np.ndarray, ' G']:
  """First objective that a share of the runs attain, at limits of a cost.

  A quantile of the empirical attainment function of two objectives (Fonseca et
  al. 2001); the median for a share of one half.

  Args:
    fronts: objectives [n, M] of every run, performance first.
    grid: limits of the cost.
    cost: index of the objective that is the cost.
    share: of the runs.
  """
  best = []
  for front in fronts:
    within = front[:, cost][None] <= grid[:, None]
    values = np.where(within, front[:, 0][None], np.inf)
    best.append(values.min(axis=1, initial=np.inf))
  ranked = np.sort(np.stack(best), axis=0)
  return ranked[int(np.ceil(share * len(ranked))) - 1]
