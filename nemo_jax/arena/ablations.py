"""Ablations: searches without one of their parts, or with another, by name."""

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

# Options of `nemo.make` by ablation; the other ablations change the problem.
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


def _with_edges(
  graph: jraph.GraphsTuple, senders: Any, receivers: Any
) -> jraph.GraphsTuple:
  """The graph with edges from senders to receivers, indices of its nodes."""
  edges: dict[str, Any] = {
    'senders': np.asarray(senders, np.int32),
    'receivers': np.asarray(receivers, np.int32),
    'n_edge': np.asarray([len(senders)], np.int32),
  }
  return graph._replace(**edges)


def ablate(
  word: str, problem: Problem, data_flow: jraph.GraphsTuple
) -> tuple[Problem, dict[str, Any]]:
  """The problem of an ablation, and the options of `nemo.make` for it.

  - `unscreened`: the surrogate does not choose among the proposals.
  - `proportional`: sizes of species have no confidence bonus.
  - `equal`: all species have the same size.
  - `hypervolume`, `front_count`: the utility of species instead of R2.
  - `featureless`: the only feature of a node is its position in the order,
    without which all nodes would look the same.
  - `edgeless`: the graph has no edges.
  - `data_flow`: the graph has the edges of the data flow instead of a chain.
  - `blind`: there are no sensitivities.

  Args:
    word: one of WORDS.
    problem: from `mixed_precision.make_problem`.
    data_flow: graph of the data flow, with the same nodes.

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
