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

from nemo_jax.base import Array, InputError, PyTree
from nemo_jax.quantization import analysis as analysis_lib
from nemo_jax.quantization import calibrate, fusion
from nemo_jax.quantization import costs as costs_lib
from nemo_jax.quantization import fake_quant as fake_quant_lib
from nemo_jax.quantization import graph as graph_lib
from nemo_jax.quantization import lowering as lowering_lib
from nemo_jax.quantization import operations as operations_lib
from nemo_jax.quantization import program as program_lib
from nemo_jax.quantization.bank import WIDTHS, Bank


class Structure(NamedTuple):
  """What the trace of a function tells, without any values."""

  quantizers: tuple[analysis_lib.Quantizer, ...]
  operations: tuple[operations_lib.Operation, ...]
  sequential_graph: jraph.GraphsTuple  # the paper's: a chain
  data_flow_graph: jraph.GraphsTuple  # with the branches
  costs: costs_lib.Costs
  bytes_per_image: int  # of activations alive at once, as traced


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
  program: program_lib.Program  # as traced for one image
  sites: tuple[analysis_lib.Site, ...]  # what is quantized in it
  quantizers: tuple[analysis_lib.Quantizer, ...]  # from here: see Structure
  operations: tuple[operations_lib.Operation, ...]
  sequential_graph: jraph.GraphsTuple
  data_flow_graph: jraph.GraphsTuple
  costs: costs_lib.Costs
  bytes_per_image: int


@flax.struct.dataclass
class Encoded:
  """What a network at certain bits is before it sees an image."""

  grids: tuple[fake_quant_lib.Grid, ...]  # one a quantizer
  codes: dict[analysis_lib.Site, Array]  # of weights, where they are used
  shifts: dict[analysis_lib.Site, Array]
  equalizers: dict[analysis_lib.Site, Array]  # see `Bank`
  max_bits: int | None = flax.struct.field(pytree_node=False)


class _Trace(NamedTuple):
  program: program_lib.Program
  analysis: analysis_lib.Analysis
  treedef: Any  # of the outputs


def _leaf_names(variables: PyTree) -> list[str]:
  """Paths such as `Conv_0/kernel`; the collection `params` goes unsaid."""
  paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(variables)]
  names = [jax.tree_util.keystr(p, simple=True, separator='/') for p in paths]
  return [n.removeprefix('params/').removesuffix('/value') for n in names]


def _trace(apply, variables, images, also) -> _Trace:
  names = _leaf_names(variables)
  closed, shapes = jax.make_jaxpr(apply, return_shape=True)(variables, images)
  program = program_lib.flatten(closed)
  analysis = analysis_lib.analyze(program, names, images.shape[0], also)
  return _Trace(program, analysis, jax.tree.structure(shapes))


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
    InputError: an option is unknown, or nothing in the function is
      quantizable.
    NotImplementedError: as for `quantize`.
  """
  _check('weight_scheme', weight_scheme, calibrate.SCHEMES)
  for kind in also:
    _check('an entry of also', kind, operations_lib.OPTIONAL_KINDS)
  program, analysis, _ = _trace(apply, variables, images, also)
  if not analysis.quantizers:
    raise InputError(
      'nothing to quantize: no convolution or matrix product of the images'
    )
  leaves = jax.tree.leaves(variables)
  sizes = [
    x.size if jnp.issubdtype(x.dtype, jnp.floating) else 0 for x in leaves
  ]
  return Structure(
    quantizers=analysis.quantizers,
    operations=analysis.operations,
    sequential_graph=graph_lib.sequential_graph(analysis),
    data_flow_graph=graph_lib.data_flow_graph(analysis),
    costs=costs_lib.count(analysis, sizes, weight_scheme == 'asymmetric'),
    bytes_per_image=program_lib.peak_bytes(program) // images.shape[0],
  )


def _run(trace: _Trace, product, variables, images, visit) -> PyTree:
  """Runs the program with its quantized operands replaced.

  Args:
    trace: the program.
    product: one of the functions in `lowering.LOWERINGS`.
    variables: inputs of the program.
    images: the last input.
    visit: (site, value) -> what to put in its place, the scale by which a
      product of it has to be multiplied, and what is then added or None.
  """
  sites = {}
  for site in trace.analysis.sites:
    outputs = trace.program.equations[site.equation].outputs
    sites.setdefault(outputs, []).append(site)

  def execute(equation, operands):
    if equation.outputs not in sites:
      return program_lib.bind(equation, operands)
    operands, scales, shifts = list(operands), [], []
    for site in sites[equation.outputs]:
      value, scale, shift = visit(site, operands[site.operand])
      operands[site.operand] = value
      scales.append((site.operand, scale))
      shifts += [] if shift is None else [(site.operand, shift)]
    dtype = trace.program.avals[equation.outputs[0]].dtype
    if equation.name in program_lib.MATRIX_PRODUCTS:
      spread = functools.partial(operations_lib.output_scale, equation)
      out = product(equation, operands) * math.prod(spread(*s) for s in scales)
      out = sum((spread(*s) for s in shifts), start=out)
      return [out.astype(dtype)]
    for i, scale in scales:
      operands[i] = (operands[i] * scale).astype(dtype)
    return program_lib.bind(equation, operands)

  arguments = [*jax.tree.leaves(variables), images]
  outputs = program_lib.run(trace.program, arguments, execute)
  return jax.tree.unflatten(trace.treedef, outputs)


def _weights(trace: _Trace, variables) -> dict[analysis_lib.Site, Array]:
  """The weights that are quantized, as they are where they are used."""
  program, analysis, _ = trace
  sites = [
    s for s in analysis.sites if analysis.quantizers[s.quantizer].is_weight
  ]
  slots = [program.equations[s.equation].inputs[s.operand] for s in sites]
  part = program_lib.needed_for(program, slots)
  values = program_lib.run(part, [*jax.tree.leaves(variables), None])
  return dict(zip(sites, values, strict=True))


def _collect(
  apply, also, lowering, of, merge, variables, images
) -> dict[int, Any]:
  """of(quantizer index, value) over the sites of each, merged, by index."""
  trace = _trace(apply, variables, images, also)
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
    Weights; [2] bounds of activations, the least value and the negative of the
    greatest; their histograms.
  """

  def weight(index, value):
    return value if quantizers[index].is_weight else None

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
      return calibrate.histogram(value, low, -negative_high)

    return collect(count, jnp.add, variables, part)

  find_bounds = jax.jit(functools.partial(collect, bounds, jnp.minimum))
  seen = [find_bounds(variables, part) for part in chunks]
  limits = jax.tree.map(lambda *x: functools.reduce(jnp.minimum, x), *seen)
  counts = [histograms(variables, part, limits) for part in chunks]
  counts = jax.tree.map(lambda *x: sum(x), *counts)
  keep_first = lambda first, _: first
  find_weights = jax.jit(functools.partial(collect, weight, keep_first))
  return find_weights(variables, chunks[0]), limits, counts


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
    apply: (variables, images) -> outputs. Its trace must not depend on the
      number of images other than in shapes.
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
    InputError: an option is unknown, there is no image, or nothing in the
      function is quantizable.
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
  if not len(images):
    raise InputError('quantize needs at least one image to calibrate with')
  images = jnp.asarray(images)
  structure = inspect(
    apply, variables, images[:chunk], also=also, weight_scheme=weight_scheme
  )
  quantizers = structure.quantizers
  chunks = [images[i : i + chunk] for i in range(0, len(images), chunk)]
  collect = functools.partial(_collect, apply, also, lowering)
  weights, limits, counts = _observe(collect, quantizers, variables, chunks)

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
  trace = functools.partial(_trace, apply, also=also)
  return _quantized(trace, images[:1], variables, lowering, bank, structure)


def _quantized(
  trace, image, variables, lowering, bank, structure: Structure
) -> Quantized:
  """The functions of a `Quantized` around its default bank."""
  default, quantizers = bank, structure.quantizers
  example = jax.ShapeDtypeStruct(image.shape, image.dtype)
  products = lowering_lib.LOWERINGS[lowering]

  def find_weights(variables):
    return _weights(trace(variables, example), variables)

  def encode(variables, bits, bank=default, max_bits=None):
    if jnp.shape(bits) != (len(quantizers),):
      raise InputError(
        f'bits has shape {jnp.shape(bits)}; there are '
        f'{len(quantizers)} quantizers'
      )
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

    return _run(trace(variables, images), product, variables, images, visit)

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

    return _run(trace(variables, images), products, variables, images, place)

  def quantized_apply(variables, images, bits, bank=default, max_bits=None):
    return run(variables, images, encode(variables, bits, bank, max_bits))

  def with_bank(bank):
    return _quantized(trace, image, variables, lowering, bank, structure)

  program, analysis, _ = trace(variables, example)
  return Quantized(
    quantized_apply,
    encode,
    run,
    intercept,
    find_weights,
    with_bank,
    bank,
    program,
    analysis.sites,
    *structure,
  )
