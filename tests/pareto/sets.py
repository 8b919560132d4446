"""Random sets of points, and what others make of them."""

import jax
import moocore
import numpy as np
import pytest
from hypothesis import settings
from pymoo.util.dominator import Dominator
from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting

from nemo_jax import pareto

batched_rank = jax.jit(
  jax.vmap(pareto.nondominated_rank, in_axes=(0, 0, None)), static_argnums=2
)

SMOOTH, FRONT, GRID = range(3)

by_example = settings(max_examples=25, deadline=None, derandomize=True)


def later(*values):
  """Parameters of tests that are slow."""
  row = lambda v: v if isinstance(v, tuple) else (v,)
  return [pytest.param(*row(v), marks=pytest.mark.slow) for v in values]


def finite_sets(seed, batch, n, m):
  """float64[batch, n, m]: a third each of clouds, thin fronts, and grids.

  The values are those of float32, so that no cast makes or breaks a tie. A
  tenth of the rows repeat another row.
  """
  rng = np.random.default_rng(seed)
  sets = rng.uniform(size=(batch, n, m))
  kind = np.arange(batch) % 3
  sets[kind == FRONT] /= sets[kind == FRONT].sum(-1, keepdims=True)
  sets[kind == GRID] = rng.integers(0, 6, sets[kind == GRID].shape) / 5
  source = np.where(
    rng.random((batch, n)) < 0.1, rng.integers(0, n, (batch, n)), np.arange(n)
  )
  sets = np.take_along_axis(sets, source[..., None], axis=1)
  return sets.astype(np.float32).astype(np.float64)


def random_masks(seed, batch, n):
  """bool[batch, n]: nearly full ones, nearly empty ones, one quite empty."""
  rng = np.random.default_rng(seed)
  masks = rng.random((batch, n)) < rng.choice([0.1, 0.5, 0.95, 1], (batch, 1))
  masks[0] = False
  return masks


def broken_sets(seed, batch, n, m):
  """Like `finite_sets`, but half of the sets hold infinities and NaNs."""
  sets = finite_sets(seed, batch, n, m)
  rng = np.random.default_rng(seed + 1)
  hurt = (rng.random(batch) < 0.5)[:, None, None]
  sets[hurt & (rng.random(sets.shape) < 0.1)] = np.inf
  sets[hurt & (rng.random(sets.shape) < 0.05)] = np.nan
  return sets


def nan_to_inf(objectives):
  return np.where(np.isnan(objectives), np.inf, objectives)


def pymoo_rank(objectives):
  # Without a dominator of its own, pymoo asks moocore.
  sorting = NonDominatedSorting(dominator=Dominator())
  return sorting.do(objectives, return_rank=True)[1]


def moocore_rank(objectives):
  # moocore 0.3.2 misplaces infinities among three objectives or more: it ranks
  # [0, inf, 0] and [inf, 0, 0] apart. A larger number than all ranks alike.
  return moocore.pareto_rank(np.where(np.isinf(objectives), 1e9, objectives))


def whole_floats(rng, shape):
  return rng.integers(0, 8, shape).astype(np.float32)


def signed_zeros(rng, shape):
  return rng.choice([-1, -0.0, 0.0, 1, np.inf], shape).astype(np.float32)


def uniform_floats(rng, shape):
  return rng.choice(rng.random(9), shape).astype(np.float32)
