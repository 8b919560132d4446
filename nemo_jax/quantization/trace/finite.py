"""Finds what makes the outputs of a network not finite."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nemo_jax.core.types import PyTree
from nemo_jax.quantization.quantized import Quantized
from nemo_jax.quantization.trace import program as program_lib
from nemo_jax.quantization.trace import tracing
from nemo_jax.quantization.trace import values as values_lib
from nemo_jax.quantization.trace.equations import bind


def _is_finite(x: Any) -> bool:
  """Whether all values are finite; integers are."""
  is_number = jnp.issubdtype(jnp.result_type(x), jnp.inexact)
  return not is_number or bool(np.all(np.isfinite(np.asarray(x, np.complex64))))


def bad_variables(variables: PyTree) -> list[str]:
  """Names of the variables that hold values that are not finite."""
  names = tracing.leaf_names(variables)
  leaves = jax.tree.leaves(variables)
  is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
  return [
    name
    for name, leaf in zip(names, leaves, strict=True)
    if not is_key(leaf) and not _is_finite(leaf)
  ]


def culprit(quantized: Quantized, variables: PyTree, example: PyTree) -> str:
  """A phrase on why the float network's outputs are not finite.

  It names the first variable that is not finite, else the first operation whose
  results are not though its operands are, else the inputs.

  Args:
    quantized: from `quantize`.
    variables: of the network.
    example: inputs [1, ...], for which the outputs are not finite.
  """
  if bad := bad_variables(variables):
    return f'the variable {bad[0]!r} holds values that are not finite'
  program, names = quantized.program, tracing.leaf_names(variables)
  leaves = [
    values_lib.Variable(name, x.size)
    for name, x in zip(names, jax.tree.leaves(variables), strict=True)
  ]
  known, _, _ = values_lib.propagate(program, leaves, ())
  found = []

  def execute(equation, operands):
    results = bind(equation, operands)
    was = all(_is_finite(x) for x in operands)
    if not found and was and not all(_is_finite(x) for x in results):
      static = [known[s] for s in equation.inputs if not known[s].dynamic]
      weights = [values_lib.weight_name(v, leaves) for v in static if v.leaves]
      of = f' of the variable {weights[0]!r}' if weights else ''
      found.append(f"the operation '{equation.name}'{of} is not finite")
    return results

  inputs = [
    jnp.repeat(x, tracing.FEW, axis=0) for x in jax.tree.leaves(example)
  ]
  program_lib.run(program, [*jax.tree.leaves(variables), *inputs], execute)
  return found[0] if found else 'the inputs hold values that are not finite'
