"""Quantizers, graphs and costs of a function, from its trace alone."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import jraph

from nemo_jax.core import checks
from nemo_jax.core.types import InputError, PyTree
from nemo_jax.quantization import costs as costs_lib
from nemo_jax.quantization.numerics.ranges import SCHEMES
from nemo_jax.quantization.trace import footprint, graph, tracing
from nemo_jax.quantization.trace.analysis import Quantizer
from nemo_jax.quantization.trace.operations import OPTIONAL_KINDS, Operation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Structure:
  """Quantizers, graphs and costs of a function, known without any values.

  Attributes:
    quantizers: N quantizers, in the order of every configuration.
    operations: operations that consume quantized tensors, in order of
      execution.
    sequential_graph: one node for each quantizer, in a chain, as in the NEMO
      paper.
    data_flow_graph: the same nodes, with edges along which the data flows.
    costs: counts that model size and BitOps are computed from.
    bytes_per_image: bytes of activations of one example that are alive at once,
      as traced.
    unread: names of variables that the function never reads.
    fixed: matrix products that are no layers, because an operand is computed
      and not stored; as text.
    outputs: jax.ShapeDtypeStruct of the outputs, for two examples.
  """

  quantizers: tuple[Quantizer, ...]
  operations: tuple[Operation, ...]
  sequential_graph: jraph.GraphsTuple
  data_flow_graph: jraph.GraphsTuple
  costs: costs_lib.Costs
  bytes_per_image: int
  unread: tuple[str, ...]
  fixed: tuple[str, ...]
  outputs: PyTree

  def num_classes(self) -> int:
    """Number of classes, C, of a network whose outputs are logits [B, C].

    Raises:
      InputError: the outputs are something else.
    """
    outputs = self.outputs
    if not isinstance(outputs, jax.ShapeDtypeStruct):
      raise InputError(
        f'outputs are a {type(outputs).__name__}; logits [B, C] are needed, '
        'such as lambda v, x: apply(v, x)[0]'
      )
    is_float = jnp.issubdtype(outputs.dtype, jnp.floating)
    if outputs.shape[:1] != (tracing.FEW,) or outputs.ndim != 2 or not is_float:
      shape = ', '.join(map(str, ('B', *outputs.shape[1:])))
      raise InputError(
        f'outputs are {outputs.dtype}[{shape}]; logits [B, C] are needed'
      )
    if outputs.shape[1] < 2:
      raise InputError('outputs are of one class; two or more are needed')
    return outputs.shape[1]


def structure_of(
  few: tracing.Trace,
  many: tracing.Trace,
  variables: PyTree,
  weight_scheme: str,
) -> Structure:
  """The structure of a function.

  Args:
    few: its trace for two examples, from `tracing.traces`.
    many: its trace for more, likewise.
    variables: of the function.
    weight_scheme: one of `ranges.SCHEMES`.

  Raises:
    InputError: nothing in the function can be quantized.
  """
  analysis = few.analysis
  if not analysis.quantizers:
    raise InputError(
      'nothing to quantize: no convolution or matrix product of the inputs'
    )
  names = tracing.leaf_names(variables)
  return Structure(
    quantizers=analysis.quantizers,
    operations=analysis.operations,
    sequential_graph=graph.sequential_graph(analysis),
    data_flow_graph=graph.data_flow_graph(analysis),
    costs=costs_lib.count(analysis, weight_scheme == 'asymmetric'),
    bytes_per_image=footprint.peak_bytes(many.program) // many.count,
    unread=tuple(names[i] for i in analysis.unread),
    fixed=analysis.fixed,
    outputs=few.outputs,
  )


def check_options(extra_ops: Sequence[str], weight_scheme: str) -> None:
  """Raises `InputError` for an unknown entry or scheme; see `quantize`."""
  checks.choice('weight_scheme', weight_scheme, SCHEMES)
  for kind in extra_ops:
    checks.choice('an entry of extra_ops', kind, OPTIONAL_KINDS)


def inspect(
  apply: tracing.Apply,
  variables: PyTree,
  inputs: PyTree,
  *,
  extra_ops: Sequence[str] = (),
  weight_scheme: str = 'symmetric',
) -> Structure:
  """The quantizers, graphs and costs of a function, without running it.

  Args:
    apply: as for `quantize`.
    variables: a pytree of arrays, or of their `jax.ShapeDtypeStruct`.
    inputs: a pytree of arrays [B, ...], likewise.
    extra_ops: as for `quantize`.
    weight_scheme: as for `quantize`.

  Raises:
    InputError: as for `quantize`.
    NotImplementedError: as for `quantize`.
  """
  check_options(extra_ops, weight_scheme)
  few, many = tracing.traces(apply, variables, inputs, extra_ops)
  return structure_of(few, many, variables, weight_scheme)
