"""Small knapsacks, and what every configuration of them costs."""

import itertools

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from nemo_jax.quantization import costs as costs_lib
from nemo_jax.search.problem import Prior
from nemo_jax.tasks.cost_prior import make_prior

WIDTHS = (2, 4, 8)
FREE = (np.inf, np.inf)  # of any budget
seeds = st.integers(0, 2**31 - 1)
few = settings(max_examples=30)


def known(table, costs, widths=WIDTHS) -> Prior:
  """The prior of sensitivities [N, K] and costs."""
  return make_prior(costs, table, widths, ('size', 'bit_operations'))


def falling(seed, count, widths=WIDTHS):
  """Sensitivities as real ones are: a quarter with each bit, about."""
  rng = np.random.default_rng(seed)
  start = 10 ** rng.uniform(-2, 2, size=(count, 1))
  noise = rng.uniform(0.5, 1.5, size=(count, len(widths)))
  return start * noise / 4.0 ** np.asarray(widths)


# Two activations, of which two weights share the first, and a weight that
# nothing multiplies.

OPERANDS = ((0, 2), (0, 3), (1, 4))
COUNT = 6
EVERY = np.asarray(list(itertools.product(range(len(WIDTHS)), repeat=COUNT)))


def instance(seed, whole=False):
  """(sensitivities, costs), spread or whole numbers.

  Those often tie, and ratios of them are exact: there are powers of two of
  parameters and of multiply-accumulates.
  """
  rng = np.random.default_rng(seed)
  if whole:
    table = rng.integers(0, 4, size=(COUNT, len(WIDTHS)))
    elements, macs = rng.integers(1, 4, 4), 1 + rng.multinomial(5, [1 / 3] * 3)
  else:
    table = falling(seed, COUNT)
    elements, macs = rng.integers(1, 10**6, 4), rng.integers(1, 10**6, 3)
  costs = costs_lib.Costs(
    elements=np.concatenate([[0, 0], elements]),
    overhead_bits=0,
    parameters=16 if whole else int(elements.sum()),
    macs=macs,
    operands=np.asarray(OPERANDS, np.int32),
  )
  return table, costs


def prices(table, costs, choices):
  """[P, 3]: loss, size and bit-operations, one term after the other."""
  rows = []
  for row in choices:
    bits = [WIDTHS[k] for k in row]
    loss = sum(table[n, k] for n, k in enumerate(row))
    size = sum(e * b for e, b in zip(costs.elements, bits, strict=True))
    work = sum(
      m * bits[a] * bits[b]
      for m, (a, b) in zip(costs.macs, OPERANDS, strict=True)
    )
    rows.append(
      [loss, size / 32 / costs.parameters, work / 32**2 / sum(costs.macs)]
    )
  return np.asarray(rows)
