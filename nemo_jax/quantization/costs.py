"""Costs of a configuration of bit-widths: model size and BitOps."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from nemo_jax.core.types import Array
from nemo_jax.quantization.numerics.widths import (
  FLOAT_BITS,
  MAX_BITS,
  check_bits,
)
from nemo_jax.quantization.trace import analysis as analysis_lib

NAMES = ('size', 'bit_operations', 'bit_operations_larger')


class Costs(NamedTuple):
  """Counts that costs are computed from, as exact integers.

  They do not depend on the bits. Of N quantizers and O products.
  """

  elements: Int[np.ndarray, ' N']  # int64, weights stored; 0 for an activation
  overhead_bits: int  # scales, zero points and all that stays in float
  parameters: int  # of the float network
  macs: Int[np.ndarray, ' O']  # int64, of each product for one example
  operands: Int[np.ndarray, 'O 2']  # int32, the two quantizers it multiplies


def _parameters(stored: analysis_lib.Stored) -> int:
  """Number of floating-point numbers in an array; a complex one is two."""
  if jnp.issubdtype(stored.dtype, jnp.complexfloating):
    return 2 * stored.elements
  is_float = jnp.issubdtype(stored.dtype, jnp.floating)
  return stored.elements if is_float else 0


def count(
  analysis: analysis_lib.Analysis, affine_weights: bool = False
) -> Costs:
  """The counts that costs of an analyzed network are computed from.

  A network stores: every quantized weight in its bit-width; a 32-bit scale for
  each of its channels and for each activation; a 32-bit zero point beside each
  scale of an affine quantizer; every other parameter (biases, norms, arrays
  that the function captured) in 32 bits; and integers, such as indices, in the
  bits of their type. Variables that the function does not read are not stored.

  Args:
    analysis: from `analysis.analyze`.
    affine_weights: whether a weight has one scale and a zero point for the
      tensor, rather than a scale for each channel.
  """
  quantizers = analysis.quantizers
  elements = [q.elements if q.is_weight else 0 for q in quantizers]
  kept = sum(map(_parameters, analysis.stored))
  others = sum(
    8 * stored.dtype.itemsize * stored.elements
    for stored in analysis.stored
    if not _parameters(stored)
  )
  symmetric = [q.is_weight and not affine_weights for q in quantizers]
  constants = sum(
    q.channels if s else 2 for q, s in zip(quantizers, symmetric, strict=True)
  )
  products = [op for op in analysis.operations if op.macs]
  return Costs(
    elements=np.asarray(elements, np.int64),
    overhead_bits=FLOAT_BITS * (kept + constants) + others,
    parameters=kept + sum(elements),
    macs=np.asarray([op.macs for op in products], np.int64),
    operands=np.asarray(
      [(op.operands[0], op.operands[-1]) for op in products], np.int32
    ).reshape(-1, 2),
  )


def _stored_bits(costs: Costs, bits: Any) -> Int[Array, ' N']:
  """Bits of one value of each tensor, int32; 32 where it is in float."""
  bits = check_bits(bits, len(costs.elements))
  return jnp.where(bits > MAX_BITS, FLOAT_BITS, bits)


def model_size(costs: Costs, bits: Any) -> int:
  """Model size in bits, exact; see `count` for what is stored.

  Args:
    costs: from `count`.
    bits: integers [N], see `widths.check_bits`.
  """
  stored = np.asarray(_stored_bits(costs, bits), np.int64)
  return int(costs.elements @ stored) + costs.overhead_bits


def size_ratio(costs: Costs, bits: Any) -> Float[Array, '']:
  """`model_size` relative to the parameters in 32 bits, float32; traceable.

  Arguments as for `model_size`.
  """
  total = FLOAT_BITS * costs.parameters
  share = jnp.asarray(costs.elements / total, jnp.float32)
  bits = _stored_bits(costs, bits)
  return jnp.sum(share * bits) + jnp.float32(costs.overhead_bits / total)


def bit_operations(costs: Costs, bits: Any, precision: str = 'product') -> int:
  """BitOps of one example, exact.

  Args:
    costs: from `count`.
    bits: integers [N], see `widths.check_bits`.
    precision: `product`, MACs x weight bits x activation bits, as in published
      tables; or `larger`, MACs x the larger of the two, the definition with
      which the figures of NEMO (arXiv 2106.07611) are reproduced.
  """
  stored = np.asarray(_stored_bits(costs, bits), np.int64)
  pair = stored[costs.operands]
  factor = {'product': pair.prod(axis=1), 'larger': pair.max(axis=1)}
  return int(costs.macs @ factor[precision])


def bit_operation_ratio(
  costs: Costs, bits: Any, precision: str = 'product'
) -> Float[Array, '']:
  """`bit_operations` relative to those in 32 bits, float32; traceable.

  Arguments as for `bit_operations`.
  """
  stored = _stored_bits(costs, bits).astype(jnp.float32)
  pair = stored[costs.operands] / FLOAT_BITS
  factor = {'product': pair.prod(axis=1), 'larger': pair.max(axis=1)}
  share = jnp.asarray(costs.macs / costs.macs.sum(), jnp.float32)
  return jnp.sum(share * factor[precision])
