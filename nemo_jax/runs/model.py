"""The network of a front: its description in JSON, loading, and running."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nemo_jax.core import files
from nemo_jax.core.types import InputError, PyTree
from nemo_jax.quantization import structure as structure_lib
from nemo_jax.quantization.numerics import bank as bank_lib
from nemo_jax.quantization.numerics import widths
from nemo_jax.quantization.quantized import Quantized
from nemo_jax.quantization.trace import tracing
from nemo_jax.quantization.trace.tracing import Apply

# Name of the bank's file in the folder of a front.
BANK_FILE = 'bank.npz'
# Keys of what `network_of` returns.
_KEYS = 'weights', 'bank', 'inputs', 'extra_ops', 'weight_scheme', 'lowering'


class Model(NamedTuple):
  """A quantized network with its weights."""

  quantized: Quantized
  variables: PyTree


def run_at(model: Model, bits: Sequence[int]) -> Callable[[PyTree], PyTree]:
  """The network at a configuration, as a jitted function of inputs [B, ...].

  Args:
    model: the network.
    bits: bit-width of each quantizer.

  Raises:
    InputError: the number of bits is not that of the quantizers.
  """
  quantized, variables = model
  count = len(quantized.quantizers)
  row = np.asarray(widths.check_bits(np.asarray(bits, np.int32), count))
  narrow = row.max() <= widths.NARROW_BITS
  encode = jax.jit(quantized.encode, static_argnames='max_bits')
  encoded = encode(
    variables, row, max_bits=widths.NARROW_BITS if narrow else None
  )
  run = jax.jit(quantized.run)
  return lambda inputs: run(variables, inputs, encoded)


def _inputs_to_json(inputs: PyTree) -> Any:
  """Shapes and types of one example, in JSON's types."""
  if isinstance(inputs, dict):
    return {'dict': {k: _inputs_to_json(v) for k, v in inputs.items()}}
  if isinstance(inputs, list | tuple):
    kind = 'list' if isinstance(inputs, list) else 'tuple'
    return {kind: [_inputs_to_json(x) for x in inputs]}
  return {'shape': list(inputs.shape[1:]), 'dtype': str(inputs.dtype)}


def _inputs_from_json(content: Any) -> PyTree:
  """`jax.ShapeDtypeStruct`s of a few examples, from `_inputs_to_json`."""
  if 'dict' in content:
    return {k: _inputs_from_json(v) for k, v in content['dict'].items()}
  for kind in (list, tuple):
    if kind.__name__ in content:
      return kind(map(_inputs_from_json, content[kind.__name__]))
  shape = (tracing.FEW, *content['shape'])
  return jax.ShapeDtypeStruct(shape, jnp.dtype(content['dtype']))


def network_of(
  quantized: Quantized, variables: PyTree, inputs: PyTree, weight_scheme: str
) -> dict[str, Any]:
  """Description by which a network is traced again: `Front.network`.

  Args:
    quantized: the network.
    variables: its weights.
    inputs: examples, arrays [B, ...] in dicts, lists or tuples.
    weight_scheme: with which it was quantized.
  """
  return {
    'weights': files.digest(variables),
    'bank': files.digest(quantized.bank),
    'inputs': _inputs_to_json(inputs),
    'extra_ops': list(quantized.extra_ops),
    'weight_scheme': weight_scheme,
    'lowering': quantized.lowering,
  }


def load(
  path: str | os.PathLike,
  known: Mapping[str, Any],
  quantizers: Sequence[str],
  apply: Apply,
  variables: PyTree,
) -> Model:
  """The network of a front, checked against the front's description.

  Args:
    path: the folder of the front.
    known: from `network_of`.
    quantizers: names of the front's quantizers.
    apply: the network.
    variables: its weights.

  Raises:
    InputError: it is another network or has other weights, or the bank is
      damaged or of another front.
  """
  folder = files.local(path)
  if not known:
    raise InputError(
      f'{folder} holds a front of an older version, without its network'
    )
  for key in _KEYS:
    if key not in known:
      raise InputError(f'{folder} is no front: network.{key} is missing')
  if files.digest(variables) != known['weights']:
    raise InputError(f'{folder} is a front of other weights than these')
  inputs = _inputs_from_json(known['inputs'])
  extra_ops = tuple(known['extra_ops'])
  few, many = tracing.traces(apply, variables, inputs, extra_ops)
  structure = structure_lib.structure_of(
    few, many, variables, known['weight_scheme']
  )
  if tuple(q.name for q in structure.quantizers) != tuple(quantizers):
    raise InputError(f'{folder} is a front of another network than this')
  bank = bank_lib.load(folder / BANK_FILE)
  if files.digest(bank) != known['bank']:
    raise InputError(f'{folder / BANK_FILE} is of another front')
  quantized = Quantized(
    function=apply,
    extra_ops=extra_ops,
    lowering=known['lowering'],
    trace=few,
    structure=structure,
    bank=bank,
  )
  weights = jax.eval_shape(quantized.weights, variables)
  try:
    bank_lib.check_fits(bank, None, few.analysis.sites, weights)
  except InputError as error:
    raise InputError(
      f'{folder / BANK_FILE} does not fit the network: {error}'
    ) from error
  return Model(quantized, variables)
