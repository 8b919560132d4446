"""`Quantized`: a function that runs at any bit-widths, and its encoding."""

import dataclasses
import functools
from typing import Any, Protocol, runtime_checkable

import flax.struct
import jax.numpy as jnp
import numpy as np

from nemo_jax.core.types import ArrayLike, PyTree
from nemo_jax.quantization.backend import fusion, lowering
from nemo_jax.quantization.costs import Costs
from nemo_jax.quantization.numerics import fake_quant
from nemo_jax.quantization.numerics import widths as widths_lib
from nemo_jax.quantization.numerics.bank import Bank
from nemo_jax.quantization.numerics.widths import CODED, MIN_BITS
from nemo_jax.quantization.structure import Structure
from nemo_jax.quantization.trace import examples, execution, tracing
from nemo_jax.quantization.trace import program as program_lib
from nemo_jax.quantization.trace.analysis import Analysis, Quantizer, Site
from nemo_jax.quantization.trace.operations import Operation


@runtime_checkable
class Visit(Protocol):
  """A replacement of the operands that are quantized."""

  def __call__(
    self, site: Site, value: ArrayLike, /
  ) -> tuple[ArrayLike, ArrayLike | None]:
    """Returns an operand, and what to add to its product or None.

    The summand has the shape of the operand's scale.
    """


@flax.struct.dataclass
class Encoded:
  """A network encoded at some bits, ready to run on inputs.

  Attributes:
    grids: N `fake_quant.Grid`s, one for each quantizer.
    codes: {site: codes of the weight that is used there}, floats.
    shifts: {site: what is added to the product of the weight}, see `Bank`.
    equalizers: {site: what an activation is multiplied by}, see `Bank`.
    max_bits: a promise that no bits are more; None without.
  """

  grids: tuple[Any, ...]
  codes: dict[Any, Any]
  shifts: dict[Any, Any]
  equalizers: dict[Any, Any]
  max_bits: int | None = flax.struct.field(pytree_node=False)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Quantized:
  """A function with its bit-widths as one more argument; see `quantize`.

  Attributes:
    function: the network as it was given.
    extra_ops: kinds of `operations.OPTIONAL_KINDS` that are quantized besides
      products.
    lowering: a name of `lowering.LOWERINGS`.
    trace: trace of the function for two examples.
    structure: quantizers, graphs and costs.
    bank: ranges and codes of every quantizer, for every bit-width.
  """

  function: tracing.Apply
  extra_ops: tuple[str, ...]
  lowering: str
  trace: tracing.Trace
  structure: Structure
  bank: Bank

  @property
  def quantizers(self) -> tuple[Quantizer, ...]:
    """N quantizers, in the order of every configuration."""
    return self.structure.quantizers

  @property
  def operations(self) -> tuple[Operation, ...]:
    """Operations that consume quantized tensors, in order of execution."""
    return self.structure.operations

  @property
  def costs(self) -> Costs:
    """Counts that model size and BitOps are computed from."""
    return self.structure.costs

  @property
  def unread(self) -> tuple[str, ...]:
    """Names of variables that the function never reads."""
    return self.structure.unread

  @property
  def fixed(self) -> tuple[str, ...]:
    """Matrix products that are no layers; see `Structure`."""
    return self.structure.fixed

  @property
  def program(self) -> program_lib.Program:
    """The function as traced for two examples."""
    return self.trace.program

  @property
  def analysis(self) -> Analysis:
    """The quantizers of `program`, and the operands that they apply to."""
    return self.trace.analysis

  def with_bank(self, bank: Bank) -> 'Quantized':
    """The same function with other ranges and codes."""
    return dataclasses.replace(self, bank=bank)

  def apply(
    self,
    variables: PyTree,
    inputs: PyTree,
    bits: Any,
    bank: Bank | None = None,
    max_bits: int | None = None,
  ) -> PyTree:
    """The outputs of the function at a configuration.

    Args:
      variables: of the function.
      inputs: a pytree of arrays [B, ...].
      bits: integers [N]; more than 16 leave a tensor in float.
      bank: ranges and codes to use in place of `self.bank`.
      max_bits: a promise that no bits are more; bits are clipped to it. It is
        static under `jax.jit`.

    Raises:
      InputError: variables or bits do not fit the function.
    """
    encoded = self.encode(variables, bits, bank, max_bits)
    return self.run(variables, inputs, encoded)

  def encode(
    self,
    variables: PyTree,
    bits: Any,
    bank: Bank | None = None,
    max_bits: int | None = None,
  ) -> Encoded:
    """The network encoded at a configuration, to be run on any inputs.

    Arguments and errors are those of `apply`.
    """
    bank = self.bank if bank is None else bank
    tracing.check_variables(variables, self.program)
    bits = widths_lib.check_bits(bits, len(self.quantizers))
    if max_bits is not None:
      bits = jnp.minimum(bits, max_bits)
    grids = tuple(
      fake_quant.grid(*r.at(b), b, max_bits)
      for r, b in zip(bank.ranges, bits, strict=True)
    )
    codes, shifts = {}, {}
    weights = self.weights(variables)
    for site, value in weights.items():
      found = _encode(
        site, value, bank, bits[site.quantizer], grids[site.quantizer], max_bits
      )
      codes[site], shift = found
      shifts |= {} if shift is None else {site: shift}
    equalizers = {s: e for s, e in bank.equalizers.items() if s not in weights}
    return Encoded(grids, codes, shifts, equalizers, max_bits)

  def run(self, variables: PyTree, inputs: PyTree, encoded: Encoded) -> PyTree:
    """The outputs of the function at a configuration.

    Args:
      variables: of the function.
      inputs: a pytree of arrays [B, ...].
      encoded: from `encode`.
    """
    narrow = (encoded.max_bits or np.inf) <= widths_lib.NARROW_BITS
    products = lowering.LOWERINGS[self.lowering]
    product = functools.partial(products, narrow=narrow)
    forward = functools.partial(self._run_by, product)
    if narrow and self.lowering == 'backend':
      of_codes = functools.partial(self._run_by, lowering.of_codes)
      forward = fusion.on_gpu(of_codes, forward)
    return forward(variables, inputs, encoded)

  def _run_by(
    self,
    product: execution.Product,
    variables: PyTree,
    inputs: PyTree,
    encoded: Encoded,
  ) -> PyTree:
    """The outputs of `run` with one way to compute products."""

    def visit(site, value):
      grid = encoded.grids[site.quantizer]
      if site in encoded.codes:
        return encoded.codes[site], grid.scale, encoded.shifts.get(site)
      value = value * encoded.equalizers.get(site, 1)
      return fake_quant.encode(value, grid), grid.scale, None

    trace = self._trace_like(variables, inputs)
    return execution.run(trace, product, variables, inputs, visit)

  def map_operands(
    self, variables: PyTree, inputs: PyTree, visit: Visit | None = None
  ) -> PyTree:
    """The outputs of the float function with quantized operands replaced.

    Args:
      variables: of the function.
      inputs: a pytree of arrays [B, ...].
      visit: the replacement; operands stay as they are if it is None.
    """

    def place(site, value):
      shift = None
      if visit is not None:
        value, shift = visit(site, value)
      return value, jnp.ones((), value.dtype), shift

    trace = self._trace_like(variables, inputs)
    product = lowering.LOWERINGS[self.lowering]
    return execution.run(trace, product, variables, inputs, place)

  def weights(self, variables: PyTree) -> dict[Site, ArrayLike]:
    """The weights that are quantized, in the shapes in which they are used."""
    return execution.weights(self.trace, variables)

  def _trace_like(self, variables: PyTree, inputs: PyTree) -> tracing.Trace:
    """The trace for as many examples as given, with the same sites."""
    found = tracing.trace(self.function, variables, inputs, self.extra_ops)
    examples.check_sites(self.analysis, found.analysis, found.count)
    return found


def _encode(
  site: Site,
  value: ArrayLike,
  bank: Bank,
  bits: ArrayLike,
  grid: fake_quant.Grid,
  max_bits: int | None,
) -> tuple[ArrayLike, ArrayLike | None]:
  """Codes of a weight, and what to add to its product or None.

  They are those of the bank if it has any, else the weight is rounded.

  Args:
    site: where the weight is used.
    value: the weight.
    bank: ranges, and perhaps codes.
    bits: int32[].
    grid: of the quantizer at these bits.
    max_bits: as for `Quantized.apply`.
  """
  stored, last = bank.codes.get(site), CODED[-1]
  nearest = None
  if stored is None or max_bits is None or max_bits > last:
    value = value * bank.equalizers.get(site, 1)
    nearest = fake_quant.encode(value, grid)
  if stored is None:
    assert nearest is not None
    return nearest, None
  row = jnp.clip(bits, MIN_BITS, last) - MIN_BITS
  codes, shift = stored[row].astype(jnp.float32), bank.shifts[site][row]
  if nearest is None:
    return codes, shift
  beyond = bits > last
  return jnp.where(beyond, nearest, codes), jnp.where(beyond, 0, shift)
