"""Times of several functions, measured in turns, and their ratios."""

import importlib
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from nemo_jax.workloads import _pretrained


def recipe(workload: str) -> _pretrained.Recipe:
  """The recipe of a workload, with its Flax module and URL of weights."""
  return importlib.import_module(f'nemo_jax.workloads.{workload}').RECIPE


def draw_variables(shapes):
  """Random weights that keep activations in range."""
  draw = np.random.default_rng(0)

  def fill(path, leaf):
    name = jax.tree_util.keystr(path)
    if 'scale' in name or 'bias' in name:
      return np.full(leaf.shape, float('scale' in name), np.float32)
    deviation = (2 / np.prod(leaf.shape[:-1])) ** 0.5
    return (draw.normal(size=leaf.shape) * deviation).astype(np.float32)

  return jax.tree_util.tree_map_with_path(fill, shapes)


def times(
  contestants: dict[str, Callable[[], object]], repeats: int
) -> dict[str, np.ndarray]:
  """Seconds [repeats] of the calls of each function, after a first call.

  Functions are called in turns, so that other load of the machine affects all
  of them alike.
  """
  found = {name: [] for name in contestants}
  rounds = [*contestants.items()] * (repeats + 1)
  for index, (name, call) in enumerate(
    tqdm.tqdm(rounds, desc='measuring', disable=None)
  ):
    start = time.perf_counter()
    call()
    if index >= len(contestants):
      found[name].append(time.perf_counter() - start)
  return {name: np.asarray(seconds) for name, seconds in found.items()}


def chip() -> tuple[float, float]:
  """Rates of a device: bfloat16 FLOP/s, and bytes copied per second.

  Measured on products of 8,192 x 8,192 matrices, and on reading and writing 4
  GiB.
  """
  size, floats = 2**13, 2**30
  matrix = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
  long = jnp.ones(floats)
  product = jax.jit(jnp.dot).lower(matrix, matrix).compile()
  copy = jax.jit(lambda x: x + 1).lower(long).compile()
  found = times(
    {
      'product': lambda: jax.block_until_ready(product(matrix, matrix)),
      'copy': lambda: jax.block_until_ready(copy(long)),
    },
    repeats=9,
  )
  fastest = {name: np.median(seconds) for name, seconds in found.items()}
  return 2 * size**3 / fastest['product'], 8 * floats / fastest['copy']


def table(
  found: dict[str, np.ndarray], first: str, unit: str, amount: float
) -> str:
  """Markdown table of rates, and factors by which the first is faster.

  A factor is a median with quartiles.

  Args:
    found: from `times`.
    first: name of the function that the others are compared with.
    unit: name of what is counted.
    amount: how many units one call does.
  """
  lines = [f'| | {unit} a second | {first} is faster by |', '|---|---|---|']
  for name, seconds in found.items():
    ratios = seconds / found[first]
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    cell = f'{middle:.2f} ({low:.2f} to {high:.2f})'
    rate = amount / np.median(seconds)
    lines.append(f'| {name} | {rate:.4g} | {"" if name == first else cell} |')
  return '\n'.join(lines)
