"""Methods side by side: the same evaluations, counted and kept the same way."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from nemo_jax import pareto
from nemo_jax.arena.baseline import Search
from nemo_jax.core.types import Array, ArrayLike
from nemo_jax.search import nemo
from nemo_jax.search import progress as progress_lib
from nemo_jax.search.problem import Population, Problem, SpeciesBuilder


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

  def score(self, choices: ArrayLike) -> np.ndarray:
    """float32[n, M]: objectives of configurations [n, N], evaluated here."""
    all_rows = np.asarray(choices, np.int32)
    found = [np.zeros((0, len(self._problem.ideal)), np.float32)]
    for start in range(0, len(all_rows), self._block):
      rows = all_rows[start : start + self._block]
      found.append(objectives(self._problem, rows, self.progress))
      padding = (0, self._block - len(rows)), (0, 0)
      columns: list[Any] = [
        np.pad(rows, padding),
        np.pad(found[-1], padding, constant_values=np.inf),
        np.zeros(self._block, np.int32),
      ]
      block = Population(*columns)
      reference = self._problem.reference
      self.note(_insert(self.archive, block, reference), len(rows))
    return np.concatenate(found)


_insert = jax.jit(pareto.archive_insert)


@functools.cache
def _evaluate(evaluate: Any) -> Callable[..., Array]:
  """Compiled once for all methods and seeds on a problem."""
  return jax.jit(evaluate)


@jax.jit
def _volume(problem, objectives):
  known = jnp.all(jnp.isfinite(objectives), axis=-1)
  return progress_lib.hypervolume(problem, objectives, known)


def objectives(
  problem: Problem,
  choices: ArrayLike,
  progress: Callable[[int], None] = lambda count: None,
) -> np.ndarray:
  """float32[n, M]: of configurations [n, N], one after the other."""
  evaluate: Any = problem.evaluate
  run, values = _evaluate(evaluate), []
  for row in np.asarray(choices, np.int32):
    values.append(np.asarray(run(problem.data, row), np.float32))
    progress(1)
  found = np.asarray(values, np.float32).reshape(-1, len(problem.ideal))
  # What fails is worth nothing, as for NEMO.
  failed = ~np.isfinite(found).all(axis=1, keepdims=True)
  return np.where(failed, np.float32(np.inf), found)


class Method(Protocol):
  """A way to search within a number of evaluations."""

  def __call__(self, key: Array, evaluations: int, ledger: Ledger) -> None:
    """Searches; the ledger keeps what is found, and counts."""


def team(
  problem: Problem,
  builders: Sequence[SpeciesBuilder],
  population_size: int,
  **options: Any,
) -> Method:
  """NEMO as a method, compiled once for all seeds.

  Args:
    problem: what is searched.
    builders: of the species.
    population_size: evaluations of a generation.
    **options: of `nemo.make`; the archive has as many slots as the ledger's.
  """
  search = nemo.make(problem, builders, population_size, **options)
  step = jax.jit(search.step)

  def run(key, evaluations, ledger):
    init_key, run_key = jax.random.split(key)
    state = search.init(init_key)
    for _ in range(evaluations // population_size):
      state, _ = step(run_key, state, problem.data)
      ledger.note(state.archive, population_size)
      ledger.progress(population_size)

  return run


def baseline(problem: Problem, search: Search) -> Method:
  """A baseline as a method on a problem."""

  def run(key, evaluations, ledger):
    search(key, problem, evaluations, ledger.score)

  return run
