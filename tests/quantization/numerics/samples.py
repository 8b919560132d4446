"""Values to find ranges of."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nemo_jax.quantization.numerics import ranges

SHAPE = (40, 3)  # of most weights, so that programs are compiled once
PERCENTILE = 95.0
each_method = pytest.mark.parametrize('method', ranges.METHODS)
weights = hnp.arrays(np.float32, SHAPE, elements=st.floats(-10, 10, width=32))
some = settings(max_examples=25, deadline=None)


def drawn(name, shape=SHAPE):
  """Values with tails of several weights, and none at all."""
  rng = np.random.default_rng(0)
  draw = {
    'gaussian': rng.normal,
    'laplace': rng.laplace,
    'uniform': lambda size: rng.uniform(-1, 1, size),
    'heavy': lambda size: rng.standard_t(2, size),
    'positive': lambda size: np.abs(rng.normal(size=size)),
    'skewed': lambda size: rng.exponential(size=size) - 0.2,
  }[name]
  return draw(size=shape).astype(np.float32)
