"""`quantize`: a JAX function with bit-widths as one more argument."""

import functools
from collections.abc import Sequence

import jax
import numpy as np
from jax.core import Tracer

from nemo_jax.core import batches, checks
from nemo_jax.core.types import ArrayLike, InputError, PyTree
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
  percentile: float | int = 99.99,
  lowering: str = 'traced',
  chunk: int = 64,
) -> Quantized:
  """A function with quantizers on its tensors, and bit-widths as an argument.

  Every tensor that a convolution or matrix product consumes gets a uniform
  quantizer. That of a weight is symmetric, with a scale for each output
  channel. That of an activation is affine with one scale for the tensor, and
  unsigned where it has no negative values. The function itself is not changed:
  it is traced, and its trace is run with the quantizers in place. It may be the
  `apply` of a Flax module, a merged nnx model or any pure function.

  The bits are traced data, so one compiled program serves all configurations.
  Products are computed of codes, which are integers, and scaled afterwards. A
  quantizer of more than 16 bits is the identity. `max_bits`, where it is an
  argument, is a static promise that no quantizer has more (bits are clipped to
  it): this case is then left out of the program, and with at most 8 an
  accelerator can use its matrix units. Gradients pass straight through the
  rounding (see `fake_quant`).

  Args:
    apply: (variables, inputs) -> outputs. It does the same to each example,
      for any number of them.
    variables: a pytree of arrays. Weights are taken from here, or from arrays
      that the function captured.
    inputs: a pytree of arrays [B, ...], a sample to calibrate the ranges with.
    extra_ops: operations besides matrix products whose operands are quantized
      too: `add`, sums of two branches, and `pool`, sums over windows or over
      all positions. With both, networks have as many quantizers as in NEMO.
    calibration: how ranges are chosen: `least_squares` error, `min_max` or
      `percentile`.
    weight_scheme: `symmetric`; or `asymmetric`, that of the NEMO paper: affine
      weights with one scale for the tensor.
    percentile: for the calibration of that name, per cent of the values in
      range.
    lowering: `traced` runs the function's own products, and with more than 16
      bits everywhere the outputs are bit-equal to the function's; `backend`
      runs each product in the form that is fastest on the platform, see
      `backend.lowering`.
    chunk: examples that calibration runs at once.

  Raises:
    InputError: an option is unknown; there is no example; variables or inputs
      are not arrays; nothing in the function can be quantized; a product has
      complex operands or a weight of integers; or the function does different
      operations for different numbers of examples.
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
    # If a weight is used several times, its first use decides the range.
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
  quantizers: Sequence[Quantizer], seen: dict[int, ArrayLike]
) -> None:
  """Raises `InputError` unless the values of all quantizers are finite.

  Args:
    quantizers: of the function.
    seen: values by the index of the quantizer; traced ones are not checked.
  """
  for index, value in seen.items():
    traced = isinstance(value, Tracer)
    if not traced and not np.all(np.isfinite(np.asarray(value, np.float32))):
      raise InputError(
        f'{quantizers[index].name} holds values that are not finite'
      )
