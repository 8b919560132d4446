"""Convolutions of policies against jraph, and the pooling of Graph U-Nets."""

import flax.linen as nn
import jax
import jraph
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_jax.search import policies
from tests.search.compiling import quickly
from tests.search.graphs import (
  GRAPHS,
  HIDDEN,
  MODELS,
  by_example,
  compiled,
  start,
)

# Pooling.


@pytest.mark.parametrize('graph', GRAPHS)
def test_every_pooling_keeps_the_better_half(graph):
  ready, _ = compiled('graph_unet', graph)

  def watched(weights):
    inputs, scores = {}, {}

    def watch(run, arguments, keywords, context):
      out = run(*arguments, **keywords)
      name = context.module.name or ''
      if name.startswith(('score', 'up')):
        inputs[name], scores[name] = arguments[0], out[:, 0]
      return out

    with nn.intercept_methods(watch):
      MODELS['graph_unet'].apply(weights, ready)
    return inputs, scores

  inputs, scores = quickly(watched)(start('graph_unet'))
  # The deepest level joins what the two above have; see what is left of it.
  outputs = [inputs['score_1'], inputs['up_1'] - inputs['score_1']]
  kept = np.ones(len(ready.nodes), bool)
  for level, nodes in enumerate(outputs):
    score = np.where(kept, scores[f'score_{level}'], -np.inf)
    count = -(-kept.sum() // 2)
    kept = np.any(np.abs(nodes) > 1e-6, axis=1)
    np.testing.assert_array_equal(kept, score >= np.sort(score)[-count])


class Kept(nn.Module):
  """One convolution among the nodes that are kept."""

  @nn.compact
  def __call__(self, sums, kept, nodes):
    return policies._convolve_kept(sums, kept, nodes, HIDDEN, 'convolution')


class Sparse(nn.Module):
  """The same by jraph."""

  @nn.compact
  def __call__(self, graph):
    layer = nn.Dense(HIDDEN, name='convolution')
    return jraph.GraphConvolution(layer)(graph).nodes


class Shared(nn.Module):
  """The same, of features that all networks share."""

  @nn.compact
  def __call__(self, graph):
    return policies.Convolution(HIDDEN, name='convolution')(graph)


@pytest.mark.parametrize('graph', GRAPHS)
def test_convolutions_by_matrix_and_by_edges_are_the_same(graph):
  ready, _ = compiled('gcn', graph)
  weights = Sparse().init(jax.random.key(0), ready)
  sums, count = policies.sums_within(ready, 1), len(ready.nodes)
  np.testing.assert_allclose(
    Kept().apply(weights, sums, np.ones(count), ready.nodes),
    Sparse().apply(weights, ready),
    rtol=1e-5,
    atol=1e-6,
  )
  np.testing.assert_allclose(
    Shared().apply(weights, ready),
    Sparse().apply(weights, ready),
    rtol=1e-5,
    atol=1e-6,
  )
  # Of some nodes, what a graph of them alone gives.
  rows = np.arange(0, count, 2)
  kept = np.zeros(count)
  kept[rows] = 1
  one = Kept().apply(weights, sums, kept, ready.nodes)
  part = policies.reach(ready, 1)[np.ix_(rows, rows)]
  alone = Kept().apply(
    weights, lambda x: part @ x, np.ones(len(rows)), ready.nodes[rows]
  )
  np.testing.assert_allclose(one[rows], alone, rtol=1e-5, atol=1e-6)
  assert not np.any(np.delete(one, rows, axis=0))


def test_globals_are_inputs_at_every_node():
  ready, _ = compiled('gcn', 'branched')
  seen = np.array([0.5, -2.0, 3.0], np.float32)
  everywhere = np.tile(seen, (len(ready.nodes), 1))
  wide = np.concatenate([ready.nodes, everywhere], axis=1)
  weights = Sparse().init(jax.random.key(0), ready._replace(nodes=wide))
  weights['params']['convolution']['bias'] += 0.3
  np.testing.assert_allclose(
    Shared().apply(weights, ready._replace(globals=seen)),
    Sparse().apply(weights, ready._replace(nodes=wide)),
    rtol=1e-5,
    atol=1e-6,
  )


SCORES = st.one_of(
  st.floats(width=32, allow_nan=False),
  st.sampled_from([0.0, -0.0, 1.0, -1.0, np.inf, -np.inf]),
)


@by_example
@given(st.lists(SCORES, min_size=1, max_size=20), st.data())
def test_the_best_are_no_worse_than_the_last_that_is_wanted(scores, data):
  scores = np.array(scores, np.float32)
  count = data.draw(st.integers(1, len(scores)))
  least = np.sort(scores)[-count]
  np.testing.assert_array_equal(policies._best(scores, count), scores >= least)
