"""`Quantized`: a function that runs at any bit-widths."""

import dataclasses
import functools
from typing import Protocol

import flax.struct
import jax.numpy as jnp
import numpy as np

from nemo_jax.core.types import Array, PyTree
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


class Visit(Protocol):
  """What to put in the place of an operand that is quantized."""

  def __call__(self, site: Site, value: Array) -> tuple[Array, Array | None]:
    """Returns an operand, and what to add to its product, or None.

    The summand is laid out as the scale of the operand.
    """


@flax.struct.dataclass
class Encoded:
  """What a network at certain bits is before it sees an input."""

  grids: tuple[fake_quant.Grid, ...]  # one a quantizer
  codes: dict[Site, Array]  # of weights, where they are used
  shifts: dict[Site, Array]
  equalizers: dict[Site, Array]  # see `Bank`
  max_bits: int | None = flax.struct.field(pytree_node=False)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Quantized:
  """A function with its bit-widths as one more argument; see `quantize`.

  Attributes:
    function: the network as it was given.
    extra_ops: of `operations.OPTIONAL_KINDS`, quantized beside products.
    lowering: a name of `lowering.LOWERINGS`.
    trace: of the function, for two examples.
    structure: what the trace tells.
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
    """What consumes quantized tensors, in order of execution."""
    return self.structure.operations

  @property
  def costs(self) -> Costs:
    """What model size and bit-operations are counted from."""
    return self.structure.costs

  @property
  def unread(self) -> tuple[str, ...]:
    """Names of variables that the function never reads."""
    return self.structure.unread

  @property
  def fixed(self) -> tuple[str, ...]:
    """Products that are no layers: with what is computed, not stored."""
    return self.structure.fixed

  @property
  def program(self) -> program_lib.Program:
    """The function as traced for two examples."""
    return self.trace.program

  @property
  def analysis(self) -> Analysis:
    """What is quantized in `program`, and where."""
    return self.trace.analysis

  def with_bank(self, bank: Bank) -> 'Quantized':
    """The same function with other ranges and codes."""
    return dataclasses.replace(self, bank=bank)

  def apply(
    self,
    variables: PyTree,
    inputs: PyTree,
    bits: Array,
    bank: Bank | None = None,
    max_bits: int | None = None,
  ) -> PyTree:
    """The outputs of the function at a configuration.

    Args:
      variables: of the function.
      inputs: a pytree of arrays [B, ...].
      bits: int32[N]; more than 16 leave a tensor in float.
      bank: in place of the own.
      max_bits: a promise that no bits are more; static.

    Raises:
      InputError: variables or bits do not fit the function.
    """
    encoded = self.encode(variables, bits, bank, max_bits)
    return self.run(variables, inputs, encoded)

  def encode(
    self,
    variables: PyTree,
    bits: Array,
    bank: Bank | None = None,
    max_bits: int | None = None,
  ) -> Encoded:
    """What depends on the bits and not on the inputs.

    It is computed once for all inputs. Arguments as for `apply`.
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
    """The outputs of the function, at what `encode` returned."""
    narrow = (encoded.max_bits or np.inf) <= widths_lib.NARROW_BITS
    products = lowering.LOWERINGS[self.lowering]
    product = functools.partial(products, narrow=narrow)
    forward = functools.partial(self._run_by, product)
    if narrow and self.lowering == 'backend':
      of_codes = functools.partial(self._run_by, lowering.of_codes)
      forward = fusion.on_gpu(of_codes, forward)
    return forward(variables, inputs, encoded)

  def _run_by(self, product, variables, inputs, encoded) -> PyTree:
    """`run` by one way to multiply."""

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
    """The outputs of the float function, its quantized operands replaced.

    Args:
      variables: of the function.
      inputs: a pytree of arrays [B, ...].
      visit: what to put in the place of each operand; nothing if absent.
    """

    def place(site, value):
      shift = None
      if visit is not None:
        value, shift = visit(site, value)
      return value, jnp.ones((), value.dtype), shift

    trace = self._trace_like(variables, inputs)
    product = lowering.LOWERINGS[self.lowering]
    return execution.run(trace, product, variables, inputs, place)

  def weights(self, variables: PyTree) -> dict[Site, Array]:
    """The weights that are quantized, as they are where they are used."""
    return execution.weights(self.trace, variables)

  def _trace_like(self, variables, inputs) -> tracing.Trace:
    """The trace for so many examples; the same operands are quantized."""
    found = tracing.trace(self.function, variables, inputs, self.extra_ops)
    examples.check_sites(self.analysis, found.analysis, found.count)
    return found


def _encode(
  site: Site,
  value: Array,
  bank: Bank,
  bits: Array,
  grid: fake_quant.Grid,
  max_bits: int | None,
) -> tuple[Array, Array | None]:
  """Codes of a weight, and what is added to its product; of the bank if there.

  Args:
    site: where the weight is used.
    value: the weight.
    bank: with ranges, and perhaps codes.
    bits: int32[].
    grid: of the quantizer at these bits.
    max_bits: as for `Quantized.apply`.
  """
  stored = bank.codes.get(site)
  last = 0 if stored is None else CODED[-1]
  nearest = None
  if max_bits is None or max_bits > last:
    value = value * bank.equalizers.get(site, 1)
    nearest = fake_quant.encode(value, grid)
  if stored is None:
    return nearest, None
  row = jnp.clip(bits, MIN_BITS, last) - MIN_BITS
  codes, shift = stored[row].astype(jnp.float32), bank.shifts[site][row]
  if nearest is None:
    return codes, shift
  beyond = bits > last
  return jnp.where(beyond, nearest, codes), jnp.where(beyond, 0, shift)
