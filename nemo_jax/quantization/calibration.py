"""Calibration: observed values of tensors, and the ranges from them."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from nemo_jax.core.types import Array, ArrayLike, PyTree
from nemo_jax.quantization.backend import lowering as lowering_lib
from nemo_jax.quantization.numerics import observe as observe_lib
from nemo_jax.quantization.numerics import ranges
from nemo_jax.quantization.trace import execution, tracing
from nemo_jax.quantization.trace.analysis import Quantizer


@runtime_checkable
class Collect(Protocol):
  """A function that computes something of every quantized operand."""

  def __call__(
    self,
    of: Callable[[int, ArrayLike], Any],
    merge: Callable[[Any, Any], Any],
    variables: PyTree,
    inputs: PyTree,
    /,
  ) -> dict[int, Any]:
    """Returns {quantizer: of(quantizer, value)}, without those that are None.

    Args:
      of: pure function of the quantizer's index and an operand.
      merge: combines the results of several operands of one quantizer.
      variables: of the function.
      inputs: a pytree of arrays [B, ...].
    """


def collector(
  function: tracing.Apply, extra_ops: Sequence[str], lowering: str
) -> Collect:
  """A `Collect` that runs a function in float; arguments as for `quantize`."""
  product = lowering_lib.LOWERINGS[lowering]

  def collect(of, merge, variables, inputs):
    trace = tracing.trace(function, variables, inputs, extra_ops)
    seen = {}

    def visit(site, value):
      found = of(site.quantizer, value)
      if site.quantizer in seen and found is not None:
        found = merge(seen[site.quantizer], found)
      seen[site.quantizer] = found
      return value, jnp.ones((), value.dtype), None

    execution.run(trace, product, variables, inputs, visit)
    return {k: v for k, v in seen.items() if v is not None}

  return collect


def observe(
  collect: Collect,
  quantizers: Sequence[Quantizer],
  variables: PyTree,
  chunks: Sequence[PyTree],
) -> tuple[dict[int, ArrayLike], dict[int, ArrayLike]]:
  """Bounds and histograms of activations, by the index of the quantizer.

  Two passes over the inputs: one for the bounds, one for the histograms.

  Args:
    collect: from `collector`.
    quantizers: of the function.
    variables: of the function.
    chunks: inputs, each a pytree of arrays [B, ...].

  Returns:
    Bounds [2], the least value and the negative of the greatest; and counts
    [observe.BINS] of the values between them.
  """

  def bounds(index, value):
    if quantizers[index].is_weight:
      return None
    value = value.astype(jnp.float32)
    return jnp.stack([jnp.min(value), -jnp.max(value)])

  @jax.jit
  def histograms(variables, part, limits):
    def count(index, value):
      if quantizers[index].is_weight:
        return None
      low, negative_high = limits[index]
      return observe_lib.count(value, low, -negative_high)

    return collect(count, jnp.add, variables, part)

  find_bounds = jax.jit(functools.partial(collect, bounds, jnp.minimum))
  seen = [find_bounds(variables, part) for part in chunks]
  limits = jax.tree.map(lambda *x: functools.reduce(jnp.minimum, x), *seen)
  counts = [histograms(variables, part, limits) for part in chunks]
  counts = jax.tree.map(lambda *x: observe_lib.total(x), *counts)
  return limits, counts


def find_ranges(
  quantizers: Sequence[Quantizer],
  method: str,
  scheme: str,
  percentile: float | int,
  weights: dict[int, Array],
  limits: dict[int, ArrayLike],
  counts: dict[int, ArrayLike],
) -> tuple[ranges.Range, ...]:
  """The range of every quantizer.

  Args:
    quantizers: of the function.
    method: one of `ranges.METHODS`.
    scheme: of weights, one of `ranges.SCHEMES`.
    percentile: for the method `percentile`, per cent of the values in range.
    weights: values of weights, by the index of the quantizer.
    limits: bounds of activations, from `observe`.
    counts: their histograms, from `observe`.
  """
  found = {
    index: ranges.weight_range(
      weight, quantizers[index].channel_axes, method, scheme, percentile
    )
    for index, weight in weights.items()
  }
  # Histograms have one shape, so one program finds the ranges of all.
  one = lambda limit, count: ranges.activation_range(
    limit[0], -limit[1], count, method, percentile
  )
  stack = lambda parts: jnp.stack([parts[i] for i in limits])
  if limits:
    tables = jax.vmap(one)(stack(limits), stack(counts))
    for row, index in enumerate(limits):
      found[index] = jax.tree.map(lambda x, row=row: x[row], tables)
  return tuple(found[i] for i in range(len(quantizers)))
