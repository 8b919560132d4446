"""Search methods with one interface, which counts and archives evaluations."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from nemo_jax import pareto
from nemo_jax.arena.baseline import Search
from nemo_jax.core.types import Array, ArrayLike
from nemo_jax.search import nemo
from nemo_jax.search import progress as progress_lib
from nemo_jax.search.problem import Population, Problem, SpeciesBuilder


class Ledger:
  """Evaluations of a method, and the non-dominated points it has found.

  Attributes:
    archive: the non-dominated points so far.
    spent: evaluations so far.
    curve: (evaluations, hypervolume) after each block, in order.
    progress: called with the number of new evaluations.
  """

  def __init__(
    self,
    problem: Problem,
    spent: int = 0,
    block: int = 20,
    progress: Callable[[int], None] = lambda count: None,
    capacity: int = 1024,
  ):
    """Starts with an empty archive.

    Args:
      problem: that is searched.
      spent: evaluations that the method's sensitivities count as.
      block: number of evaluations between two measurements of the hypervolume;
        the last block of a call of `score` may be smaller.
      progress: called with the number of new evaluations.
      capacity: of the archive.
    """
    self._problem, self._block, self.progress = problem, block, progress
    self.archive = pareto.empty_population(
      capacity, len(problem.allowed), len(problem.ideal)
    )
    self.spent, self.curve = spent, [(spent, 0.0)]

  def note(self, archive: Population, count: int) -> None:
    """Replaces the archive, and counts `count` more evaluations."""
    self.archive, self.spent = archive, self.spent + count
    values = archive.objectives
    self.curve.append((self.spent, float(_volume(self._problem, values))))

  def front(self) -> tuple[Int[np.ndarray, 'n N'], Float[np.ndarray, 'n M']]:
    """Choices and objectives of the archive."""
    values = np.asarray(self.archive.objectives)
    found = np.isfinite(values).all(axis=1)
    return np.asarray(self.archive.choices)[found], values[found]

  def score(self, choices: Int[ArrayLike, 'n N']) -> Float[np.ndarray, 'n M']:
    """Objectives of configurations, float32, evaluated and archived."""
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
  """The compiled evaluation, shared by all methods and seeds of a problem."""
  return jax.jit(evaluate)


@jax.jit
def _volume(
  problem: Problem, objectives: Float[Array, 'n M']
) -> Float[Array, '']:
  """Hypervolume of the rows that are finite."""
  known = jnp.all(jnp.isfinite(objectives), axis=-1)
  return progress_lib.hypervolume(problem, objectives, known)


def objectives(
  problem: Problem,
  choices: Int[ArrayLike, 'n N'],
  progress: Callable[[int], None] = lambda count: None,
) -> Float[np.ndarray, 'n M']:
  """Objectives of configurations, float32, evaluated one after the other.

  All objectives of a failed configuration are +inf.

  Args:
    problem: with the evaluation.
    choices: the configurations.
    progress: called with 1 after each.
  """
  evaluate: Any = problem.evaluate
  run, values = _evaluate(evaluate), []
  for row in np.asarray(choices, np.int32):
    values.append(np.asarray(run(problem.data, row), np.float32))
    progress(1)
  found = np.asarray(values, np.float32).reshape(-1, len(problem.ideal))
  # A failed configuration is no solution, as in NEMO.
  failed = ~np.isfinite(found).all(axis=1, keepdims=True)
  return np.where(failed, np.float32(np.inf), found)


class Method(Protocol):
  """A search with a budget of evaluations."""

  def __call__(self, key: Array, evaluations: int, ledger: Ledger) -> None:
    """Searches, and notes evaluations and points in the ledger."""


def team(
  problem: Problem,
  builders: Sequence[SpeciesBuilder],
  population_size: int,
  **options: Any,
) -> Method:
  """NEMO with a team of species as a method, compiled once for all seeds.

  Args:
    problem: that is searched.
    builders: of the species.
    population_size: evaluations of a generation.
    **options: of `nemo.make`; `archive_size` is to be the ledger's capacity.
  """
  search = nemo.make(problem, builders, population_size, **options)
  step = jax.jit(search.step)

  def run(key: Array, evaluations: int, ledger: Ledger) -> None:
    init_key, run_key = jax.random.split(key)
    state = search.init(init_key)
    for _ in range(evaluations // population_size):
      state, _ = step(run_key, state, problem.data)
      ledger.note(state.archive, population_size)
      ledger.progress(population_size)

  return run


def baseline(problem: Problem, search: Search) -> Method:
  """A baseline as a method on a problem."""

  def run(key: Array, evaluations: int, ledger: Ledger) -> None:
    search(key, problem, evaluations, ledger.score)

  return run
