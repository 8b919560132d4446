"""Edges, reach and sums over neighbours, against breadth-first search."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_jax.search import policies
from tests.search.graphs import as_set, by_example, make_graph, near


def edge_sets(count):
  return st.sets(
    st.tuples(st.integers(0, count - 1), st.integers(0, count - 1)),
    max_size=2 * count,
  )


random_edges = st.integers(1, 9).flatmap(
  lambda count: st.tuples(st.just(count), edge_sets(count))
)


@by_example
@given(random_edges, st.booleans())
def test_undirected_has_both_directions_and_one_self_edge_each(case, twice):
  count, edges = case
  given_edges = list(edges) * (2 if twice else 1)
  graph = policies.undirected(make_graph(count, given_edges))
  expected = {(i, i) for i in range(count)} | edges
  expected |= {(receiver, sender) for sender, receiver in edges}
  assert as_set(graph.senders, graph.receivers) == expected
  assert graph.n_edge.tolist() == [len(expected)]
  assert graph.senders.dtype == graph.receivers.dtype == np.int32


@by_example
@given(random_edges, st.integers(1, 5))
def test_reach_is_what_breadth_first_search_finds(case, hops):
  count, edges = case
  pairs = as_set(*np.nonzero(policies.reach(make_graph(count, edges), hops)))
  for node in range(count):
    found = {receiver for sender, receiver in pairs if sender == node}
    assert found == near(count, edges, node, hops)


@by_example
@given(
  st.integers(1, 60),
  st.lists(st.tuples(st.integers(0, 59), st.integers(2, 5)), max_size=4),
  st.integers(1, 4),
  st.integers(1, 9),
)
def test_sums_are_the_product_with_the_matrix_of_reach(n, skips, hops, tile):
  edges = {(i, i + 1) for i in range(n - 1)}
  edges |= {(start, start + far) for start, far in skips if start + far < n}
  graph = make_graph(n, edges)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(policies, '_TILE', tile)
    sums = policies.sums_within(graph, hops)(graph.nodes)
  expected = policies.reach(graph, hops) @ graph.nodes
  np.testing.assert_allclose(sums, expected, rtol=1e-5, atol=1e-5)
