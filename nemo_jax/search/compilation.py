"""A generation compiled as three programs: ask, evaluate and tell."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import PartitionSpec

from nemo_jax.core import devices
from nemo_jax.core.types import Array, PyTree
from nemo_jax.search.evaluate import evaluate
from nemo_jax.search.problem import Problem
from nemo_jax.search.state import Metrics, State


class Compiled(NamedTuple):
  """A compiled generation.

  `step` returns the next state and metrics. It donates the buffers of the state
  it is given, which cannot be used afterwards. `evaluation` is the program that
  computes the objectives of the candidates.
  """

  step: Callable[[State], tuple[State, Metrics]]
  evaluation: jax.stages.Compiled


def compile_generation(
  problem: Problem,
  ask: Callable[..., PyTree],
  tell: Callable[..., PyTree],
  key: Array,
  state: State,
  batch_size: int | None = None,
) -> Compiled:
  """Compiled generation, as three programs: ask, evaluate, tell.

  Candidates are evaluated on the mesh. `ask` and `tell` are compiled for one
  device of each process, whatever the mesh: for another number of devices, XLA
  generates code that rounds differently, and the search would take another
  course.

  Args:
    problem: the problem to search.
    ask: (problem, key, state) -> asked, state.
    tell: (problem, key, state, asked, objectives) -> state, metrics.
    key: random key of the run.
    state: from `init`.
    batch_size: candidates evaluated at once, see `evaluate`.
  """
  mesh, apart = problem.mesh, dataclasses.replace(problem, data=None, mesh=None)
  place = lambda x: devices.place(x, mesh, PartitionSpec())
  of_ask = lambda state, problem: ask(problem, key, state)
  of_tell = lambda state, problem, asked, objectives: tell(
    problem, key, state, asked, objectives
  )
  asks = jax.jit(of_ask, donate_argnames='state').lower(
    state=state, problem=apart
  )
  score: Any = functools.partial(evaluate, batch_size=batch_size)
  score = devices.jit(score, mesh)
  scores = score.lower(problem, place(state.population.choices))
  asked, after = asks.out_info
  tells = jax.jit(of_tell, donate_argnames='state').lower(
    state=after,
    problem=apart,
    asked=asked,
    objectives=state.population.objectives,
  )
  asks, scores, tells = asks.compile(), scores.compile(), tells.compile()

  def step(state):
    asked, state = asks(state=state, problem=apart)
    objectives = np.asarray(scores(problem, place(asked.choices)), np.float32)
    return tells(state=state, problem=apart, asked=asked, objectives=objectives)

  return Compiled(step, scores)
