"""`quantize`: any JAX function, with its bit-widths as one more argument."""

import functools
from collections.abc import Sequence

import jax
import numpy as np

from nemo_jax.core import batches, checks
from nemo_jax.core.types import Array, InputError, PyTree
from nemo_jax.quantization import calibration as calibration_lib
from nemo_jax.quantization import structure as structure_lib
from nemo_jax.quantization.backend import lowering as lowering_lib
from nemo_jax.quantization.numerics import ranges
from nemo_jax.quantization.numerics.bank import Bank
from nemo_jax.quantization.quantized import Quantized
from nemo_jax.quantization.structure import Structure, inspect
from nemo_jax.quantization.trace import execution, tracing
from nemo_jax.quantization.trace.analysis import Quantizer

__all__ = ['Quantized', 'Structure', 'inspect', 'quantize']


def quantize(
  apply: tracing.Apply,
  variables: PyTree,
  inputs: PyTree,
  *,
  extra_ops: Sequence[str] = (),
  calibration: str = 'least_squares',
  weight_scheme: str = 'symmetric',
  percentile: float = 99.99,
  lowering: str = 'traced',
  chunk: int = 64,
) -> Quantized:
  """The quantizers of a function, and the function with bits as an argument.

  Every tensor that a convolution or matrix product consumes gets a uniform
  quantizer: weights symmetric, with a scale for each output channel;
  activations affine, with one scale a tensor, unsigned where they have no
  negative values. The function need not know: it is traced, and its trace is
  run with the quantizers in place. It may be the `apply` of a Flax module, a
  merged nnx model or any pure function.

  The bits are traced data, so one compiled program serves every
  configuration. Products are taken of codes, which are whole numbers, and
  scaled after. A quantizer at more than 16 bits is the identity. A promise
  that none has more than `max_bits` (static; bits are clipped to it) leaves
  that case out, and up to 8 lets an accelerator use its matrix units.
  Gradients pass straight through the rounding (see `fake_quant`).

  Args:
    apply: (variables, inputs) -> outputs. It does the same to each image, for
      any number of them.
    variables: a pytree of arrays; weights come from here or from constants
      that the function captured.
    inputs: a pytree of arrays [B, ...], a sample that calibrates the ranges.
    extra_ops: operations beside matrix products whose operands are quantized
      too: `add`, sums of two branches, and `pool`, sums over windows or over
      all positions. With both, NEMO's counts of quantizers come out.
    calibration: `least_squares` error, `min_max` or `percentile`.
    weight_scheme: `symmetric`, or `asymmetric`, the paper's: affine weights
      with one scale a tensor.
    percentile: per cent of the values within range, for that method.
    lowering: `traced` runs the function's own products, so that over 16 bits
      everywhere it is the function to the last bit; `backend` runs each in
      the form that is fastest where it runs, see `lowering`.
    chunk: examples that calibration runs at once.

  Raises:
    InputError: an option is unknown, there is no example, variables or inputs
      are no arrays, nothing in the function is quantizable, a product has
      complex operands or a weight of whole numbers, or the function does other
      operations for another number of examples.
    NotImplementedError: a matrix product of the inputs lies where it cannot
      be reached, such as the body of a `scan`.
  """
  checks.choice('calibration', calibration, ranges.METHODS)
  checks.choice('lowering', lowering, lowering_lib.LOWERINGS)
  if not 0 < percentile <= 100 or chunk < 1:
    raise InputError(
      f'percentile is {percentile}, chunk is {chunk}; they go from 0 to 100 '
      'and from 1'
    )
  structure_lib.check_options(extra_ops, weight_scheme)
  count = tracing.check_arguments(variables, inputs)
  inputs = batches.on_device(inputs)
  first = batches.take(inputs, slice(chunk))
  few, many = tracing.traces(apply, variables, first, extra_ops)
  structure = structure_lib.structure_of(few, many, variables, weight_scheme)
  quantizers = structure.quantizers
  chunks = [
    batches.take(inputs, slice(i, i + chunk)) for i in range(0, count, chunk)
  ]
  collect = calibration_lib.collector(apply, extra_ops, lowering)
  seen = calibration_lib.observe(collect, quantizers, variables, chunks)

  @jax.jit
  def find_weights(variables):
    weights = execution.weights(few, variables)
    # Of a weight that is read twice the first is as good.
    return {s.quantizer: w for s, w in reversed(weights.items())}

  weights = find_weights(variables)
  _check_finite(quantizers, weights | seen[0])
  find_ranges = functools.partial(
    calibration_lib.find_ranges,
    quantizers,
    calibration,
    weight_scheme,
    percentile,
  )
  return Quantized(
    function=apply,
    extra_ops=tuple(extra_ops),
    lowering=lowering,
    trace=few,
    structure=structure,
    bank=Bank(jax.jit(find_ranges)(weights, *seen)),
  )


def _check_finite(
  quantizers: Sequence[Quantizer], seen: dict[int, Array]
) -> None:
  """Raises `InputError` unless all that was seen of a quantizer is finite."""
  for index, value in seen.items():
    traced = isinstance(value, jax.core.Tracer)
    if not traced and not np.all(np.isfinite(np.asarray(value, np.float32))):
      raise InputError(
        f'{quantizers[index].name} holds values that are not finite'
      )
