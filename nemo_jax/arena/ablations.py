"""A search with something taken out of it, or replaced, by a word."""

import dataclasses
import functools
import math
from typing import Any

import jraph
import numpy as np

from nemo_jax.core.types import InputError
from nemo_jax.search import surrogate
from nemo_jax.search.problem import Problem
from nemo_jax.tasks import mixed_precision

# What a word changes in `nemo.make`; the others change the problem.
SETTINGS = {
  'unscreened': {'surrogate': functools.partial(surrogate.make, screens=False)},
  'proportional': {'exploration': 0.0},
  'equal': {'exploration': math.inf},
  'hypervolume': {'utility': 'hypervolume'},
  'front_count': {'utility': 'front_count'},
}
WORDS = (*SETTINGS, 'featureless', 'edgeless', 'data_flow', 'blind')


def check(word: str) -> None:
  """Raises `InputError` unless the word is one of WORDS."""
  if word not in WORDS:
    raise InputError(
      f'unknown ablation {word!r}; the choices are {", ".join(WORDS)}'
    )


def _with_edges(graph: jraph.GraphsTuple, senders, receivers):
  """The graph with other edges between its nodes."""
  edges: dict[str, Any] = {
    'senders': np.asarray(senders, np.int32),
    'receivers': np.asarray(receivers, np.int32),
    'n_edge': np.asarray([len(senders)], np.int32),
  }
  return graph._replace(**edges)


def ablate(
  word: str, problem: Problem, data_flow: jraph.GraphsTuple
) -> tuple[Problem, dict]:
  """The problem, and options of `nemo.make`, with what the word names.

  In `unscreened` the surrogate picks nothing; `proportional` and `equal` size
  species without the confidence bonus, or all alike; `hypervolume` and
  `front_count` are utilities in place of R2. `featureless` leaves nodes their
  place in the order
  alone, without which all would be one; `edgeless` no edge; `data_flow` has the
  edges of the data flow in place of the chain; `blind` no sensitivities.

  Args:
    word: one of WORDS.
    problem: from `mixed_precision.make_problem`.
    data_flow: the graph of the data flow, with the same nodes.

  Raises:
    InputError: the word is unknown.
  """
  check(word)
  graph = problem.graph
  if word == 'featureless':
    place = np.linspace(-1, 1, len(problem.allowed), dtype=np.float32)[:, None]
    problem = dataclasses.replace(problem, graph=graph._replace(nodes=place))
  elif word == 'edgeless':
    problem = dataclasses.replace(problem, graph=_with_edges(graph, [], []))
  elif word == 'data_flow':
    graph = _with_edges(graph, data_flow.senders, data_flow.receivers)
    problem = dataclasses.replace(problem, graph=graph)
  elif word == 'blind':
    problem = mixed_precision.blind(problem)
  return problem, SETTINGS.get(word, {})
