"""A program with its quantized operands replaced."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp

from nemo_jax.core.types import Array, PyTree
from nemo_jax.quantization.trace import operations as operations_lib
from nemo_jax.quantization.trace import program as program_lib
from nemo_jax.quantization.trace.analysis import Site
from nemo_jax.quantization.trace.program import Equation
from nemo_jax.quantization.trace.tracing import Trace


class Product(Protocol):
  """A way to compute a convolution or matrix product."""

  def __call__(self, equation: Equation, operands: Sequence[Array]) -> Array:
    """Returns the product of two operands."""


Replace = Callable[[Site, Array], tuple[Array, Array, Array | None]]


def _with_rank(x: Array, rank: int) -> Array:
  """The array with axes of size 1 in front added or left out; no numbers."""
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
  """Runs the program with its quantized operands replaced.

  Args:
    trace: the program.
    product: how products are computed, see `lowering.LOWERINGS`.
    variables: inputs of the program.
    inputs: the examples.
    visit: (site, value) -> what to put in its place, the scale by which a
      product of it has to be multiplied, and what is then added or None.
  """
  program, analysis, sites = trace.program, trace.analysis, {}
  for site in analysis.sites:
    outputs = program.equations[analysis.places[site.operation]].outputs
    sites.setdefault(outputs, []).append(site)

  def execute(equation, operands):
    if equation.outputs not in sites:
      return program_lib.bind(equation, operands)
    operands, scales, shifts = list(operands), [], []
    for site in sites[equation.outputs]:
      value, scale, shift = visit(site, operands[site.operand])
      # A weight that is repeated along the batch is kept for one image.
      shape = program.avals[equation.inputs[site.operand]].shape
      value, scale = (_with_rank(x, len(shape)) for x in (value, scale))
      operands[site.operand] = jnp.broadcast_to(value, shape)
      scales.append((site.operand, scale))
      shifts += [] if shift is None else [(site.operand, shift)]
    dtype = program.avals[equation.outputs[0]].dtype
    if equation.name in program_lib.MATRIX_PRODUCTS:
      spread = functools.partial(operations_lib.output_scale, equation)
      out = product(equation, operands) * math.prod(spread(*s) for s in scales)
      out = sum((spread(*s) for s in shifts), start=out)
      return [out.astype(dtype)]
    for i, scale in scales:
      dtype = program.avals[equation.inputs[i]].dtype
      operands[i] = (operands[i] * scale).astype(dtype)
    return program_lib.bind(equation, operands)

  arguments = [*jax.tree.leaves(variables), *jax.tree.leaves(inputs)]
  outputs = program_lib.run(program, arguments, execute)
  return jax.tree.unflatten(jax.tree.structure(trace.outputs), outputs)


def weights(trace: Trace, variables: PyTree) -> dict[Site, Array]:
  """The weights that are quantized, as they are where they are used."""
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
