"""Times of several things, taken in turn, as ratios with medians."""

import time
from collections.abc import Callable

import jax
import numpy as np
import tqdm


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
  """Seconds of every call, [repeats] each, after one call to warm up.

  All take turns, so that what else the machine does meets all of them.
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


def table(
  found: dict[str, np.ndarray], first: str, unit: str, amount: float
) -> str:
  """Rates, and how many times as fast the first is: median and quartiles.

  Args:
    found: from `times`.
    first: the contestant that the others are compared with.
    unit: of what is counted.
    amount: how much of it one call does.
  """
  lines = [f'| | {unit} a second | {first} is faster by |', '|---|---|---|']
  for name, seconds in found.items():
    ratios = seconds / found[first]
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    cell = f'{middle:.2f} ({low:.2f} to {high:.2f})'
    rate = amount / np.median(seconds)
    lines.append(f'| {name} | {rate:.4g} | {"" if name == first else cell} |')
  return '\n'.join(lines)
