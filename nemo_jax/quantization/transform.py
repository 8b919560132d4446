"""`quantize`: any JAX function, with its bit-widths as one more argument."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import jraph
import numpy as np

from nemo_jax.core.types import Array, InputError, PyTree
from nemo_jax.quantization import costs as costs_lib
from nemo_jax.quantization.backend import fusion
from nemo_jax.quantization.backend import lowering as lowering_lib
from nemo_jax.quantization.numerics import fake_quant as fake_quant_lib
from nemo_jax.quantization.numerics import ranges as calibrate
from nemo_jax.quantization.numerics.bank import WIDTHS, Bank
from nemo_jax.quantization.trace import analysis as analysis_lib
from nemo_jax.quantization.trace import examples, tracing
from nemo_jax.quantization.trace import graph as graph_lib
from nemo_jax.quantization.trace import operations as operations_lib
from nemo_jax.quantization.trace import program as program_lib


class Structure(NamedTuple):
  """What the trace of a function tells, without any values."""

  quantizers: tuple[analysis_lib.Quantizer, ...]
  operations: tuple[operations_lib.Operation, ...]
  sequential_graph: jraph.GraphsTuple  # the paper's: a chain
  data_flow_graph: jraph.GraphsTuple  # with the branches
  costs: costs_lib.Costs
  bytes_per_image: int  # of activations alive at once, as traced
  unread: tuple[str, ...]  # variables that the function never reads
  fixed: tuple[str, ...]  # products that are no layers: with what is computed
  outputs: PyTree  # of jax.ShapeDtypeStruct, for two examples


class Quantized(NamedTuple):
  """A function that can be run at any bit-widths, and what is known of it."""

  apply: Callable[..., Any]
  # (variables, images, bits [N] int32, bank=bank, max_bits=None) -> what the
  # function returned; `run` of `encode`
  encode: Callable[..., 'Encoded']
  # (variables, bits, bank=bank, max_bits=None) -> what depends on the bits and
  # not on the images, to be computed once for all of them
  run: Callable[..., Any]  # (variables, images, encoded) -> as `apply`
  intercept: Callable[..., Any]
  # (variables, images, visit=None): the float network, by the same lowering;
  # visit(site, value) returns what to put in the place of an operand, and what
  # to add to its product, laid out as a scale, or None
  weights: Callable[..., Any]  # variables -> {site: the weight used there}
  with_bank: Callable[[Bank], 'Quantized']  # the same with another default
  bank: Bank
  program: program_lib.Program  # as traced for two images
  analysis: analysis_lib.Analysis  # of it
  quantizers: tuple[analysis_lib.Quantizer, ...]  # from here: see Structure
  operations: tuple[operations_lib.Operation, ...]
  sequential_graph: jraph.GraphsTuple
  data_flow_graph: jraph.GraphsTuple
  costs: costs_lib.Costs
  bytes_per_image: int
  unread: tuple[str, ...]
  fixed: tuple[str, ...]
  outputs: PyTree


def num_classes(quantized: Quantized) -> int:
  """C of a network whose outputs are logits [B, C].

  Raises:
    InputError: its outputs are something else.
  """
  outputs = quantized.outputs
  if not isinstance(outputs, jax.ShapeDtypeStruct):
    raise InputError(
      f'outputs are a {type(outputs).__name__}; logits [B, C] are needed, such '
      'as lambda v, x: apply(v, x)[0]'
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


@flax.struct.dataclass
class Encoded:
  """What a network at certain bits is before it sees an image."""

  grids: tuple[fake_quant_lib.Grid, ...]  # one a quantizer
  codes: dict[analysis_lib.Site, Array]  # of weights, where they are used
  shifts: dict[analysis_lib.Site, Array]
  equalizers: dict[analysis_lib.Site, Array]  # see `Bank`
  max_bits: int | None = flax.struct.field(pytree_node=False)


def inspect(
  apply: Callable[[PyTree, Array], PyTree],
  variables: PyTree,
  images: Array,
  *,
  also: Sequence[str] = (),
  weight_scheme: str = 'symmetric',
) -> Structure:
  """The quantizers, graphs and costs of a function; allocates nothing.

  Args:
    apply: as for `quantize`.
    variables: arrays, or their `jax.ShapeDtypeStruct`.
    images: [B, ...], likewise.
    also: as for `quantize`.
    weight_scheme: as for `quantize`.

  Raises:
    InputError: an option is unknown, nothing in the function is quantizable,
      or as for `quantize`.
    NotImplementedError: as for `quantize`.
  """
  _check_structure(also, weight_scheme)
  few, many = tracing.traces(apply, variables, images, also)
  return _structure(few, many, variables, weight_scheme)


def _check_structure(also: Sequence[str], weight_scheme: str) -> None:
  """Raises `InputError` for unknown options."""
  _check('weight_scheme', weight_scheme, calibrate.SCHEMES)
  for kind in also:
    _check('an entry of also', kind, operations_lib.OPTIONAL_KINDS)


def _structure(
  few: tracing.Trace, many: tracing.Trace, variables, weight_scheme: str
) -> Structure:
  """The structure of a function, from both of its traces."""
  analysis = few.analysis
  if not analysis.quantizers:
    raise InputError(
      'nothing to quantize: no convolution or matrix product of the images'
    )
  names = tracing.leaf_names(variables)
  return Structure(
    quantizers=analysis.quantizers,
    operations=analysis.operations,
    sequential_graph=graph_lib.sequential_graph(analysis),
    data_flow_graph=graph_lib.data_flow_graph(analysis),
    costs=costs_lib.count(analysis, weight_scheme == 'asymmetric'),
    bytes_per_image=program_lib.peak_bytes(many.program) // many.count,
    unread=tuple(names[i] for i in analysis.unread),
    fixed=analysis.fixed,
    outputs=few.outputs,
  )


def _with_rank(x: Array, rank: int) -> Array:
  """The array with axes of size 1 in front added or left out; no numbers."""
  if x.ndim in (0, rank):
    return x
  return x.reshape((1,) * (rank - x.ndim) + x.shape[max(x.ndim - rank, 0) :])


def _run(trace: tracing.Trace, product, variables, images, visit) -> PyTree:
  """Runs the program with its quantized operands replaced.

  Args:
    trace: the program.
    product: one of the functions in `lowering.LOWERINGS`.
    variables: inputs of the program.
    images: the last input.
    visit: (site, value) -> what to put in its place, the scale by which a
      product of it has to be multiplied, and what is then added or None.
  """
  program, analysis, sites = trace.program, trace.analysis, {}
  for site in analysis.sites:
    outputs = program.equations[analysis.places[site.operation]].outputs
    sites.setdefault(outputs, []).append(site)

  def execute(equation, operands):
    if equation.outputs not in sites:
      return program_lib.bind(equation, operands)
    operands, scales, shifts = list(operands), [], []
    for site in sites[equation.outputs]:
      value, scale, shift = visit(site, operands[site.operand])
      # A weight that is repeated along the batch is kept for one image.
      shape = program.avals[equation.inputs[site.operand]].shape
      value, scale = (_with_rank(x, len(shape)) for x in (value, scale))
      operands[site.operand] = jnp.broadcast_to(value, shape)
      scales.append((site.operand, scale))
      shifts += [] if shift is None else [(site.operand, shift)]
    dtype = program.avals[equation.outputs[0]].dtype
    if equation.name in program_lib.MATRIX_PRODUCTS:
      spread = functools.partial(operations_lib.output_scale, equation)
      out = product(equation, operands) * math.prod(spread(*s) for s in scales)
      out = sum((spread(*s) for s in shifts), start=out)
      return [out.astype(dtype)]
    for i, scale in scales:
      dtype = program.avals[equation.inputs[i]].dtype
      operands[i] = (operands[i] * scale).astype(dtype)
    return program_lib.bind(equation, operands)

  arguments = [*jax.tree.leaves(variables), images]
  outputs = program_lib.run(program, arguments, execute)
  return jax.tree.unflatten(jax.tree.structure(trace.outputs), outputs)


def _weights(trace: tracing.Trace, variables) -> dict[analysis_lib.Site, Array]:
  """The weights that are quantized, as they are where they are used."""
  program, analysis = trace.program, trace.analysis
  sites = [
    s for s in analysis.sites if analysis.quantizers[s.quantizer].is_weight
  ]
  slots = [analysis.slot(program, site) for site in sites]
  part = program_lib.needed_for(program, slots)
  values = program_lib.run(part, [*jax.tree.leaves(variables), None])
  for site, axes in analysis.repeated.items():
    index = sites.index(site)
    for axis in axes:
      values[index] = jax.lax.slice_in_dim(values[index], 0, 1, axis=axis)
  return dict(zip(sites, values, strict=True))


def _collect(
  apply, also, lowering, of, merge, variables, images
) -> dict[int, Any]:
  """of(quantizer index, value) over the sites of each, merged, by index."""
  trace = tracing.trace(apply, variables, images, also)
  seen = {}

  def visit(site, value):
    found = of(site.quantizer, value)
    if site.quantizer in seen and found is not None:
      found = merge(seen[site.quantizer], found)
    seen[site.quantizer] = found
    return value, jnp.ones((), value.dtype), None

  product = lowering_lib.LOWERINGS[lowering]
  _run(trace, product, variables, images, visit)
  return {k: v for k, v in seen.items() if v is not None}


def _observe(collect, quantizers, variables, chunks) -> tuple[dict, ...]:
  """What calibration needs to see, by the index of the quantizer.

  Two passes over the images: one for bounds, one for what lies between.

  Returns:
    [2] bounds of activations, the least value and the negative of the greatest;
    their histograms.
  """

  def bounds(index, value):
    if quantizers[index].is_weight:
      return None
    value = value.astype(jnp.float32)
    return jnp.stack([jnp.min(value), -jnp.max(value)])

  @jax.jit
  def histograms(variables, part, limits):
    def count(index, value):
      if quantizers[index].is_weight:
        return None
      low, negative_high = limits[index]
      return calibrate.count(value, low, -negative_high)

    return collect(count, jnp.add, variables, part)

  find_bounds = jax.jit(functools.partial(collect, bounds, jnp.minimum))
  seen = [find_bounds(variables, part) for part in chunks]
  limits = jax.tree.map(lambda *x: functools.reduce(jnp.minimum, x), *seen)
  counts = [histograms(variables, part, limits) for part in chunks]
  counts = jax.tree.map(lambda *x: calibrate.total(x), *counts)
  return limits, counts


def _ranges(
  quantizers, method, scheme, percentile, weights, limits, counts
) -> tuple[calibrate.Range, ...]:
  """The range of every quantizer, from what `_observe` returned."""
  ranges = {
    index: calibrate.weight_range(
      weight, quantizers[index].channel_axes, method, scheme, percentile
    )
    for index, weight in weights.items()
  }
  # Activations are alike once they are histograms, so one program does all.
  one = lambda limit, count: calibrate.activation_range(
    limit[0], -limit[1], count, method, percentile
  )
  stack = lambda parts: jnp.stack([parts[i] for i in limits])
  if limits:
    tables = jax.vmap(one)(stack(limits), stack(counts))
    for row, index in enumerate(limits):
      ranges[index] = jax.tree.map(lambda x, row=row: x[row], tables)
  return tuple(ranges[i] for i in range(len(quantizers)))


def _check(name: str, value: str, choices: Sequence[str]) -> None:
  if value not in choices:
    raise InputError(
      f'{name} is {value!r}; the choices are {", ".join(choices)}'
    )


def quantize(
  apply: Callable[[PyTree, Array], PyTree],
  variables: PyTree,
  images: Array,
  *,
  also: Sequence[str] = (),
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
    apply: (variables, images) -> outputs. It does the same to each image, for
      any number of them.
    variables: a pytree of arrays; weights come from here or from constants
      that the function captured.
    images: [B, ...], a sample that calibrates the ranges.
    also: operations beside matrix products whose operands are quantized too:
      `add`, sums of two branches, and `pool`, sums over windows or over all
      positions. With both, NEMO's counts of quantizers come out.
    calibration: `least_squares` error, `min_max` or `percentile`.
    weight_scheme: `symmetric`, or `asymmetric`, the paper's: affine weights
      with one scale a tensor.
    percentile: per cent of the values within range, for that method.
    lowering: `traced` runs the function's own products, so that over 16 bits
      everywhere it is the function to the last bit; `backend` runs each in
      the form that is fastest where it runs, see `lowering`.
    chunk: images that calibration runs at once.

  Raises:
    InputError: an option is unknown, there is no image, variables or images
      are no arrays, nothing in the function is quantizable, a product has
      complex operands or a weight of whole numbers, or the function does other
      operations for another number of images.
    NotImplementedError: a matrix product of the images lies where it cannot
      be reached, such as the body of a `scan`.
  """
  _check('calibration', calibration, calibrate.METHODS)
  _check('lowering', lowering, lowering_lib.LOWERINGS)
  if not 0 < percentile <= 100 or chunk < 1:
    raise InputError(
      f'percentile is {percentile}, chunk is {chunk}; they go from 0 to 100 '
      'and from 1'
    )
  tracing.check_arguments(variables, images)
  if not len(images):
    raise InputError('quantize needs at least one image to calibrate with')
  images = jnp.asarray(images)
  _check_structure(also, weight_scheme)
  few, many = tracing.traces(apply, variables, images[:chunk], also)
  structure = _structure(few, many, variables, weight_scheme)
  quantizers = structure.quantizers
  chunks = [images[i : i + chunk] for i in range(0, len(images), chunk)]
  collect = functools.partial(_collect, apply, also, lowering)
  limits, counts = _observe(collect, quantizers, variables, chunks)
  trace = functools.partial(tracing.trace, apply, also=also)

  @jax.jit
  def find_weights(variables):
    weights = _weights(few, variables)
    # Of a weight that is read twice the first is as good.
    return {s.quantizer: w for s, w in reversed(weights.items())}

  weights = find_weights(variables)

  for index, seen in (weights | limits).items():
    traced = isinstance(seen, jax.core.Tracer)
    if not traced and not np.all(np.isfinite(np.asarray(seen, np.float32))):
      name = quantizers[index].name
      raise InputError(f'{name} holds values that are not finite')
  find_ranges = jax.jit(
    functools.partial(
      _ranges, quantizers, calibration, weight_scheme, percentile
    )
  )
  bank = Bank(find_ranges(weights, limits, counts))
  return _quantized(trace, few, lowering, bank, structure)


def _quantized(
  trace, known: tracing.Trace, lowering, bank, structure: Structure
) -> Quantized:
  """The functions of a `Quantized` around its default bank."""
  default, quantizers = bank, structure.quantizers
  products = lowering_lib.LOWERINGS[lowering]

  def trace_same(variables, images):
    found = trace(variables, images)
    examples.check_sites(known.analysis, found.analysis, found.count)
    return found

  def find_weights(variables):
    return _weights(known, variables)

  def encode(variables, bits, bank=default, max_bits=None):
    tracing.check_variables(variables, known.program)
    bits = fake_quant_lib.check_bits(bits, len(quantizers))
    if max_bits is not None:
      bits = jnp.minimum(bits, max_bits)
    grids = tuple(
      fake_quant_lib.grid(*r.at(b), b, max_bits)
      for r, b in zip(bank.ranges, bits, strict=True)
    )
    weights = find_weights(variables)
    codes, shifts = {}, {}
    for site, value in weights.items():
      value = value * bank.equalizers.get(site, 1)
      width = bits[site.quantizer]
      stored = bank.codes.get(site)
      last = 0 if stored is None else WIDTHS[-1]
      if max_bits is None or max_bits > last:
        codes[site] = fake_quant_lib.encode(value, grids[site.quantizer])
      if stored is None:
        continue
      row = jnp.clip(width, WIDTHS[0], last) - WIDTHS[0]
      held = stored[row].astype(jnp.float32)
      shift = bank.shifts[site][row]
      beyond = width > last
      if site in codes:
        held = jnp.where(beyond, codes[site], held)
        shift = jnp.where(beyond, 0, shift)
      codes[site], shifts[site] = held, shift
    equalizers = {s: e for s, e in bank.equalizers.items() if s not in weights}
    return Encoded(grids, codes, shifts, equalizers, max_bits)

  def run_by(product, variables, images, encoded):
    def visit(site, value):
      grid = encoded.grids[site.quantizer]
      if site in encoded.codes:
        return encoded.codes[site], grid.scale, encoded.shifts.get(site)
      value = value * encoded.equalizers.get(site, 1)
      return fake_quant_lib.encode(value, grid), grid.scale, None

    found = trace_same(variables, images)
    return _run(found, product, variables, images, visit)

  def run(variables, images, encoded):
    narrow = (encoded.max_bits or np.inf) <= lowering_lib.NARROW_BITS
    product = functools.partial(products, narrow=narrow)
    forward = functools.partial(run_by, product)
    if narrow and lowering == 'backend':
      of_codes = functools.partial(run_by, lowering_lib.of_codes)
      forward = fusion.on_gpu(of_codes, forward)
    return forward(variables, images, encoded)

  def intercept(variables, images, visit=None):
    def place(site, value):
      shift = None
      if visit is not None:
        value, shift = visit(site, value)
      return value, jnp.ones((), value.dtype), shift

    found = trace_same(variables, images)
    return _run(found, products, variables, images, place)

  def quantized_apply(variables, images, bits, bank=default, max_bits=None):
    return run(variables, images, encode(variables, bits, bank, max_bits))

  def with_bank(bank):
    return _quantized(trace, known, lowering, bank, structure)

  return Quantized(
    quantized_apply,
    encode,
    run,
    intercept,
    find_weights,
    with_bank,
    bank,
    known.program,
    known.analysis,
    *structure,
  )
