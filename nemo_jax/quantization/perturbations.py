"""The changes that quantization makes to a float network, and their effect.

A change is a step of every quantized operand, and of every shift that a bank
adds to the product of a weight. The float network is run with the steps as one
more argument, so that its logits can be differentiated by them.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Float, Num

from nemo_jax.core.types import Array, ArrayLike, PyTree
from nemo_jax.quantization.numerics import fake_quant
from nemo_jax.quantization.numerics.bank import Bank
from nemo_jax.quantization.quantized import Quantized
from nemo_jax.quantization.trace.analysis import Site

Result = TypeVar('Result')


class Steps(NamedTuple):
  """One array for every quantized operand, and one for every shift."""

  operands: dict[Site, Array]  # in the shape of the operand
  shifts: dict[Site, Array]  # in the shape of a row of the bank's shifts


def at_bits(
  quantized: Quantized,
  variables: PyTree,
  bank: Bank,
  operands: dict[Site, ArrayLike],
  bits: ArrayLike,
) -> Steps:
  """The steps that quantization at a configuration makes.

  Args:
    quantized: the network.
    variables: of the network.
    bank: ranges and codes.
    operands: float values of the quantized operands, by site.
    bits: int32[N].
  """
  encoded = quantized.encode(variables, bits, bank)
  found = {}
  for site, value in operands.items():
    grid = encoded.grids[site.quantizer]
    factor = bank.equalizers.get(site, 1)
    codes = encoded.codes.get(site)
    if codes is None:
      codes = fake_quant.encode(value * factor, grid)
    found[site] = codes * grid.scale / factor - value
  return Steps(found, encoded.shifts)


def at_widths(
  quantized: Quantized,
  variables: PyTree,
  bank: Bank,
  operands: dict[Site, ArrayLike],
  widths: Sequence[int] | ArrayLike,
  of: Callable[[Steps], Array],
) -> Float[Array, 'N K']:
  """A function of the steps, with every quantizer at each of K widths.

  Args:
    quantized: the network.
    variables: of the network.
    bank: ranges and codes.
    operands: float values of the quantized operands, by site.
    widths: K bit-widths.
    of: steps -> float32[N].
  """
  count = len(quantized.quantizers)

  def one(width):
    bits = jnp.full(count, width)
    return of(at_bits(quantized, variables, bank, operands, bits))

  return jax.lax.map(one, jnp.asarray(widths)).T


def inner(
  quantized: Quantized, left: Steps, right: Steps
) -> Float[Array, ' N']:
  """Inner products of two sets of steps, by quantizer."""
  out = jnp.zeros(len(quantized.quantizers))
  for a, b in zip(left, right, strict=True):
    for site in a:
      product = jnp.sum(a[site].astype(jnp.float32) * b[site])
      out = out.at[site.quantizer].add(product)
  return out


def around(
  quantized: Quantized, variables: PyTree, bank: Bank, inputs: PyTree
) -> tuple[
  Callable[[Steps], tuple[Num[Array, '...'], dict[Site, ArrayLike]]], Steps
]:
  """The logits as a function of the steps; and steps of zero.

  The function returns (float32[B, C] logits, float values of the operands).

  Args:
    quantized: the network.
    variables: of the network.
    bank: its shifts have steps of their own.
    inputs: a pytree of arrays [B, ...].
  """

  def forward(steps):
    seen = {}

    def visit(site, value):
      seen[site] = value
      step = steps.operands.get(site)
      value = value if step is None else value + step
      return value, steps.shifts.get(site)

    logits = quantized.map_operands(variables, inputs, visit)
    return logits.astype(jnp.float32), seen

  _, shapes = jax.eval_shape(forward, Steps({}, {}))
  zeros = lambda x: jnp.zeros(x.shape, x.dtype)
  none = Steps(
    jax.tree.map(zeros, shapes),
    {s: zeros(x[0]) for s, x in bank.shifts.items()},
  )
  return forward, none
