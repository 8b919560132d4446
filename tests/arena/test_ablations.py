"""Each word takes out what it says."""

import inspect

import jax
import numpy as np
import pytest

from nemo_jax.arena import ablations
from nemo_jax.core.types import InputError
from nemo_jax.search import nemo
from tests.placement import placement_problem

PROBLEM = placement_problem(6)
FLOW = PROBLEM.graph._replace(
  senders=np.array([0, 1, 2, 0, 3], np.int32),
  receivers=np.array([1, 2, 3, 4, 5], np.int32),
)


def edges(problem):
  graph = problem.graph
  assert graph.n_edge.tolist() == [len(graph.senders)]
  return list(
    zip(graph.senders.tolist(), graph.receivers.tolist(), strict=True)
  )


@pytest.mark.parametrize('word', ablations.WORDS)
def test_nothing_else_is_changed(word):
  problem, settings = ablations.ablate(word, PROBLEM, FLOW)
  assert settings.keys() <= inspect.signature(nemo.make).parameters.keys()
  same = PROBLEM.replace(graph=None, prior=None)
  jax.tree.map(
    np.testing.assert_array_equal,
    same,
    problem.replace(graph=None, prior=None),
  )
  assert (settings != {}) == (word in ablations.SETTINGS)
  if settings:
    assert problem is PROBLEM


def test_edges_are_taken_or_put():
  assert edges(ablations.ablate('edgeless', PROBLEM, FLOW)[0]) == []
  flow = edges(ablations.ablate('data_flow', PROBLEM, FLOW)[0])
  assert flow == [(0, 1), (1, 2), (2, 3), (0, 4), (3, 5)]


def test_a_node_without_features_knows_its_place():
  problem, _ = ablations.ablate('featureless', PROBLEM, FLOW)
  place = problem.graph.nodes
  assert place.shape == (6, 1)
  assert np.all(np.diff(place[:, 0]) > 0)
  assert edges(problem) == edges(PROBLEM)


def test_the_blind_have_no_estimate():
  problem, _ = ablations.ablate('blind', PROBLEM, FLOW)
  assert problem.prior is None


def test_an_unknown_word_lists_the_known():
  with pytest.raises(InputError, match="'fast'; the choices are unscreened, "):
    ablations.ablate('fast', PROBLEM, FLOW)
