"""Runs of a program with its quantized operands replaced."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from nemo_jax.core.types import Array, ArrayLike, PyTree
from nemo_jax.quantization.trace import operations as operations_lib
from nemo_jax.quantization.trace import program as program_lib
from nemo_jax.quantization.trace.analysis import Site
from nemo_jax.quantization.trace.equations import (
  MATRIX_PRODUCTS,
  Equation,
  bind,
)
from nemo_jax.quantization.trace.tracing import Trace


@runtime_checkable
class Product(Protocol):
  """A way to compute a convolution or matrix product."""

  def __call__(
    self, equation: Equation, operands: Sequence[ArrayLike], /
  ) -> Array:
    """Returns the product of two operands."""


Replace = Callable[
  [Site, ArrayLike], tuple[ArrayLike, ArrayLike, ArrayLike | None]
]


def _with_rank(x: ArrayLike, rank: int) -> ArrayLike:
  """The array with axes of size 1 added or removed in front; not a scalar."""
  if x.ndim in (0, rank):
    return x
  return x.reshape((1,) * (rank - x.ndim) + x.shape[max(x.ndim - rank, 0) :])


def run(
  trace: Trace,
  product: Product,
  variables: PyTree,
  inputs: PyTree,
  visit: Replace,
) -> PyTree:
  """The outputs of a function with its quantized operands replaced.

  Args:
    trace: trace of the function, for as many examples.
    product: how products are computed, see `lowering.LOWERINGS`.
    variables: of the function.
    inputs: a pytree of arrays [B, ...].
    visit: (site, value) -> (the replacement, the scale by which a product of it
      is multiplied, what is then added to the product or None).
  """
  program, analysis, sites = trace.program, trace.analysis, {}
  for site in analysis.sites:
    outputs = program.equations[analysis.places[site.operation]].outputs
    sites.setdefault(outputs, []).append(site)

  def execute(equation, operands):
    if equation.outputs not in sites:
      return bind(equation, operands)
    operands, scales, shifts = list(operands), [], []
    for site in sites[equation.outputs]:
      value, scale, shift = visit(site, operands[site.operand])
      # A weight that is repeated along the batch is kept for one example.
      shape = program.avals[equation.inputs[site.operand]].shape
      value, scale = (_with_rank(x, len(shape)) for x in (value, scale))
      operands[site.operand] = jnp.broadcast_to(value, shape)
      scales.append((site.operand, scale))
      shifts += [] if shift is None else [(site.operand, shift)]
    dtype = program.avals[equation.outputs[0]].dtype
    if equation.name in MATRIX_PRODUCTS:
      spread = functools.partial(operations_lib.output_scale, equation)
      out = product(equation, operands) * math.prod(spread(*s) for s in scales)
      out = sum((spread(*s) for s in shifts), start=out)
      return [out.astype(dtype)]
    for i, scale in scales:
      dtype = program.avals[equation.inputs[i]].dtype
      operands[i] = (operands[i] * scale).astype(dtype)
    return bind(equation, operands)

  arguments = [*jax.tree.leaves(variables), *jax.tree.leaves(inputs)]
  outputs = program_lib.run(program, arguments, execute)
  return jax.tree.unflatten(jax.tree.structure(trace.outputs), outputs)


def weights(trace: Trace, variables: PyTree) -> dict[Site, ArrayLike]:
  """The weights that are quantized, in the shapes in which they are used.

  One that is repeated along the batch is returned for one example.

  Args:
    trace: trace of the function for two examples.
    variables: of the function.
  """
  program, analysis = trace.program, trace.analysis
  sites = [
    s for s in analysis.sites if analysis.quantizers[s.quantizer].is_weight
  ]
  slots = [analysis.slot(program, site) for site in sites]
  part = program_lib.needed_for(program, slots)
  values = program_lib.run_static(part, jax.tree.leaves(variables))
  for site, axes in analysis.repeated.items():
    index = sites.index(site)
    for axis in axes:
      values[index] = jax.lax.slice_in_dim(values[index], 0, 1, axis=axis)
  return dict(zip(sites, values, strict=True))
