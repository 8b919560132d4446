"""Methods side by side: the same evaluations, counted and kept the same way."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from nemo_jax import pareto
from nemo_jax.core.types import Array
from nemo_jax.search import nemo
from nemo_jax.search.problem import Population, Problem, Species


class Ledger:
  """What a method has spent and found.

  Attributes:
    archive: a `Population`, every non-dominated point so far.
    spent: evaluations so far.
    curve: list of (evaluations, hypervolume), in order.
    progress: to be told of every evaluation.
  """

  def __init__(
    self,
    problem: Problem,
    spent: int = 0,
    block: int = 20,
    progress: Callable[[int], None] = lambda count: None,
    capacity: int = 1024,
  ):
    """Starts with nothing found.

    Args:
      problem: what is searched.
      spent: evaluations that the method's knowledge has taken.
      block: configurations that the archive takes at once, and after which the
        hypervolume is measured; the last ones are fewer.
      progress: is told of every evaluation.
      capacity: of the archive.
    """
    self._problem, self._block, self.progress = problem, block, progress
    self.archive = pareto.empty_population(
      capacity, len(problem.allowed), len(problem.ideal)
    )
    self.spent, self.curve = spent, [(spent, 0.0)]

  def note(self, archive: Population, count: int) -> None:
    """Takes over the archive of a method that did `count` more evaluations."""
    self.archive, self.spent = archive, self.spent + count
    values = archive.objectives
    self.curve.append((self.spent, float(_volume(self._problem, values))))

  def front(self) -> tuple[np.ndarray, np.ndarray]:
    """Choices [n, N] and objectives [n, M] of the archive."""
    values = np.asarray(self.archive.objectives)
    found = np.isfinite(values).all(axis=1)
    return np.asarray(self.archive.choices)[found], values[found]

  def score(self, choices: Array) -> Array:
    """float32[n, M]: objectives of configurations [n, N], evaluated here."""
    choices = np.asarray(choices, np.int32)
    found = [np.zeros((0, len(self._problem.ideal)), np.float32)]
    for start in range(0, len(choices), self._block):
      rows = choices[start : start + self._block]
      found.append(objectives(self._problem, rows, self.progress))
      padding = (0, self._block - len(rows)), (0, 0)
      block = Population(
        np.pad(rows, padding),
        np.pad(found[-1], padding, constant_values=np.inf),
        np.zeros(self._block, np.int32),
      )
      reference = self._problem.reference
      self.note(_insert(self.archive, block, reference), len(rows))
    return np.concatenate(found)


_insert = jax.jit(pareto.archive_insert)


@functools.cache
def _evaluate(evaluate):
  """Compiled once for all methods and seeds on a problem."""
  return jax.jit(evaluate)


@jax.jit
def _volume(problem, objectives):
  known = jnp.all(jnp.isfinite(objectives), axis=-1)
  return nemo.hypervolume(problem, objectives, known)


def objectives(
  problem: Problem,
  choices: Array,
  progress: Callable[[int], None] = lambda count: None,
) -> np.ndarray:
  """float32[n, M]: of configurations [n, N], one after the other."""
  run, values = _evaluate(problem.evaluate), []
  for row in np.asarray(choices, np.int32):
    values.append(np.asarray(run(problem.data, row), np.float32))
    progress(1)
  found = np.asarray(values, np.float32).reshape(-1, len(problem.ideal))
  # What fails is worth nothing, as for NEMO.
  failed = ~np.isfinite(found).all(axis=1, keepdims=True)
  return np.where(failed, np.float32(np.inf), found)


def team(
  species: tuple[Species, ...], population_size: int, **options
) -> Callable[[Array, Problem, int, Ledger], None]:
  """NEMO as a method: runs (key, problem, evaluations, ledger).

  Args:
    species: made for a problem and the population size.
    population_size: evaluations of a generation.
    **options: of `nemo.step`.
  """
  step = jax.jit(functools.partial(nemo.step, species=species, **options))

  def search(key, problem, evaluations, ledger):
    init_key, run_key = jax.random.split(key)
    capacity = ledger.archive.choices.shape[0]
    state = nemo.init(init_key, problem, species, population_size, capacity)
    for _ in range(evaluations // population_size):
      state, _ = step(run_key, state, problem)
      ledger.note(state.archive, population_size)
      ledger.progress(population_size)

  return search


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
