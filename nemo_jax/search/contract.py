"""Checks of a problem: shapes, types and values that a search relies on.

Shapes and types are always checked. Values are checked only if they are known,
that is, not while they are traced.
"""

from typing import Any

import numpy as np

from nemo_jax.core import checks
from nemo_jax.core.types import Array, InputError
from nemo_jax.search.problem import Graph, Prior, Problem


def check_problem(problem: Problem) -> None:
  """Raises `InputError` unless the problem can be searched.

  A problem needs at least one objective, each with a finite ideal below a
  finite reference; at least one node, and two choices at each, of which one or
  more is allowed; and a graph and a prior, if any, whose shapes fit these.
  """
  allowed = checks.array('problem.allowed', problem.allowed, 'NK', 'bool')
  nodes, choices = allowed.shape
  if not nodes or choices < 2:
    raise InputError(
      f'problem.allowed has shape {allowed.shape}; a search needs one node or '
      'more, with two choices or more'
    )
  known = checks.concrete(problem.allowed)
  if known is not None and not np.all(np.any(known, axis=1)):
    barred = np.flatnonzero(~np.any(known, axis=1))[0]
    raise InputError(f'problem.allowed leaves node {barred} no choice')
  _check_bounds(problem)
  if problem.graph is not None:
    _check_graph(problem.graph, nodes)
  if problem.prior is not None:
    _check_prior(problem.prior, nodes, choices)


def _check_bounds(problem: Problem) -> None:
  """Raises `InputError` unless each ideal is below its reference."""
  ideal = checks.array('problem.ideal', problem.ideal, 'M')
  count = len(ideal)
  if not count:
    raise InputError('problem.ideal is empty; give an objective or more')
  reference = checks.array('problem.reference', problem.reference, 'M', M=count)
  ideal, reference = checks.concrete(ideal), checks.concrete(reference)
  if ideal is None or reference is None:
    return
  fits = np.isfinite(ideal) & np.isfinite(reference) & (ideal < reference)
  if not np.all(fits):
    row = np.flatnonzero(~fits)[0]
    raise InputError(
      f'objective {row} has ideal {ideal[row]} and reference {reference[row]}; '
      'give finite numbers, the ideal below the reference'
    )


def _check_finite(name: str, value: Array) -> None:
  """Raises `InputError` if a known value is not finite."""
  known = checks.concrete(value)
  if known is not None and not np.all(np.isfinite(known)):
    raise InputError(f'{name} holds values that are not finite')


def _check_indices(name: str, value: Array, nodes: int) -> None:
  """Raises `InputError` if a known value is not the index of a node."""
  known = checks.concrete(value)
  if known is not None and np.any((known < 0) | (known >= nodes)):
    raise InputError(f'{name} names a node that is not from 0 to {nodes - 1}')


def _check_graph(graph: Graph, nodes: int) -> None:
  """Raises `InputError` unless the graph fits the number of nodes."""
  features = checks.array('problem.graph.nodes', graph.nodes, 'NF', N=nodes)
  _check_finite('problem.graph.nodes', features)
  senders = checks.array('problem.graph.senders', graph.senders, 'E', 'whole')
  receivers = checks.array(
    'problem.graph.receivers', graph.receivers, 'E', 'whole', E=len(senders)
  )
  _check_indices('problem.graph.senders', senders, nodes)
  _check_indices('problem.graph.receivers', receivers, nodes)


def _check_prior(prior: Prior, nodes: int, choices: int) -> None:
  """Raises `InputError` unless the prior fits these numbers."""
  pairs = checks.array('problem.prior.pairs', prior.pairs, 'Es', 'whole')
  _check_indices('problem.prior.pairs', pairs, nodes)
  costs = np.shape(prior.costs)[-1] if np.ndim(prior.costs) else 0
  sizes: dict[str, Any] = {'N': nodes, 'K': choices, 'L': choices, 'C': costs}
  sizes |= {'E': len(pairs), 's': 2}
  for name, axes in (
    ('loss', 'NK'),
    ('costs', 'NKC'),
    ('pairs', 'Es'),
    ('pair_costs', 'EKLC'),
  ):
    whole = f'problem.prior.{name}'
    value = checks.array(whole, getattr(prior, name), axes, **sizes)
    _check_finite(whole, value)
