"""What a configuration of bit-widths costs: model size and bit-operations."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from nemo_jax.core.types import Array
from nemo_jax.quantization.numerics.widths import (
  FLOAT_BITS,
  MAX_BITS,
  check_bits,
)
from nemo_jax.quantization.trace import analysis as analysis_lib

NAMES = ('size', 'bit_operations', 'bit_operations_larger')


class Costs(NamedTuple):
  """Counts that do not depend on the bits, as exact NumPy integers."""

  elements: np.ndarray  # [N] int64, weights stored; 0 for an activation
  overhead_bits: int  # scales, zero points and all that stays in float
  parameters: int  # of the float network
  macs: np.ndarray  # [O] int64, of each operation, for one image
  operands: np.ndarray  # [O, 2] int32, the quantizers it multiplies


def _parameters(stored: analysis_lib.Stored) -> int:
  """Floating-point numbers in an array; complex ones are two."""
  if jnp.issubdtype(stored.dtype, jnp.complexfloating):
    return 2 * stored.elements
  is_float = jnp.issubdtype(stored.dtype, jnp.floating)
  return stored.elements if is_float else 0


def count(
  analysis: analysis_lib.Analysis, affine_weights: bool = False
) -> Costs:
  """The costs of an analyzed network.

  Stored are: every quantized weight in its bit-width; a 32-bit scale for each
  of its channels and for each activation; a 32-bit zero point beside each
  scale of an affine quantizer; every other parameter (biases, norms, arrays
  that the function captured) in 32 bits; and whole numbers, such as indices, in
  the bits of their type. Variables that the function does not read are not
  stored.

  Args:
    analysis: from `analysis.analyze`.
    affine_weights: weights have one scale a tensor and a zero point, not a
      scale for each channel.
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


def _stored_bits(costs: Costs, bits: Array) -> Array:
  """int32[N]: what a number of each tensor takes, 32 where it is in float."""
  bits = check_bits(bits, len(costs.elements))
  return jnp.where(bits > MAX_BITS, FLOAT_BITS, bits)


def model_size(costs: Costs, bits: np.ndarray) -> int:
  """Bits that the network takes on disk, exact; see `count` for what counts."""
  stored = np.asarray(_stored_bits(costs, bits), np.int64)
  return int(costs.elements @ stored) + costs.overhead_bits


def size_ratio(costs: Costs, bits: Array) -> Array:
  """float32[]: `model_size` over the 32-bit parameters; traceable."""
  total = FLOAT_BITS * costs.parameters
  share = jnp.asarray(costs.elements / total, jnp.float32)
  bits = _stored_bits(costs, bits)
  return jnp.sum(share * bits) + jnp.float32(costs.overhead_bits / total)


def bit_operations(
  costs: Costs, bits: np.ndarray, precision: str = 'product'
) -> int:
  """Bit-operations of one image, exact.

  Args:
    costs: from `count`.
    bits: int[N].
    precision: `product`, MACs x weight bits x activation bits, as in the
      published tables; or `larger`, MACs x the larger of the two, the reading
      of NEMO (arXiv 2106.07611) that agrees with its figures.
  """
  stored = np.asarray(_stored_bits(costs, bits), np.int64)
  pair = stored[costs.operands]
  factor = {'product': pair.prod(axis=1), 'larger': pair.max(axis=1)}
  return int(costs.macs @ factor[precision])


def bit_operation_ratio(
  costs: Costs, bits: Array, precision: str = 'product'
) -> Array:
  """float32[]: `bit_operations` over those of 32-bit floats; traceable."""
  stored = _stored_bits(costs, bits).astype(jnp.float32)
  pair = stored[costs.operands] / FLOAT_BITS
  factor = {'product': pair.prod(axis=1), 'larger': pair.max(axis=1)}
  share = jnp.asarray(costs.macs / costs.macs.sum(), jnp.float32)
  return jnp.sum(share * factor[precision])
