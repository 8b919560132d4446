"""`quantize`: any JAX function, with its bit-widths as one more argument."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jraph
import numpy as np

from nemo_jax.base import Array, InputError, PyTree
from nemo_jax.quantization import analysis as analysis_lib
from nemo_jax.quantization import calibrate
from nemo_jax.quantization import costs as costs_lib
from nemo_jax.quantization import fake_quant as fake_quant_lib
from nemo_jax.quantization import graph as graph_lib
from nemo_jax.quantization import lowering as lowering_lib
from nemo_jax.quantization import operations as operations_lib
from nemo_jax.quantization import program as program_lib


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
  # (variables, images, bits [N] int32, ranges=ranges) -> what `apply` returned
  ranges: tuple[calibrate.Range, ...]  # one a quantizer
  quantizers: tuple[analysis_lib.Quantizer, ...]  # from here: see Structure
  operations: tuple[operations_lib.Operation, ...]
  sequential_graph: jraph.GraphsTuple
  data_flow_graph: jraph.GraphsTuple
  costs: costs_lib.Costs
  bytes_per_image: int


class _Trace(NamedTuple):
  program: program_lib.Program
  analysis: analysis_lib.Analysis
  treedef: Any  # of the outputs


LOWERINGS = {'traced': program_lib.bind, 'backend': lowering_lib.execute}


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


def _run(trace: _Trace, lowering: str, variables, images, visit) -> PyTree:
  """Runs the program, every quantized operand replaced by visit(site, x)."""
  sites = {}
  for site in trace.analysis.sites:
    sites.setdefault(site.equation, []).append(site)

  def intercept(index, operands):
    operands = list(operands)
    for site in sites.get(index, ()):
      operands[site.operand] = visit(site, operands[site.operand])
    return operands

  arguments = [*jax.tree.leaves(variables), images]
  outputs = program_lib.run(
    trace.program, arguments, intercept, LOWERINGS[lowering]
  )
  return jax.tree.unflatten(trace.treedef, outputs)


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
    return value

  _run(trace, lowering, variables, images, visit)
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
  configuration. A quantizer at more than 16 bits is the identity. Gradients
  pass straight through the rounding (see `fake_quant`).

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
    lowering: `traced` runs the function's own operations, so that over 16 bits
      everywhere it is the function to the last bit; `backend` runs each in
      the form that is fastest where it runs, equal to float rounding.
    chunk: images that calibration runs at once.

  Raises:
    InputError: an option is unknown, there is no image, or nothing in the
      function is quantizable.
    NotImplementedError: a matrix product of the images lies where it cannot
      be reached, such as the body of a `scan`.
  """
  _check('calibration', calibration, calibrate.METHODS)
  _check('lowering', lowering, LOWERINGS)
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
  calibrated = find_ranges(weights, limits, counts)

  def quantized_apply(variables, images, bits, ranges=calibrated):
    if jnp.shape(bits) != (len(quantizers),):
      raise InputError(
        f'bits has shape {jnp.shape(bits)}; there are '
        f'{len(quantizers)} quantizers'
      )

    def visit(site, value):
      width = bits[site.quantizer]
      scale, zero_point = ranges[site.quantizer].at(width)
      return fake_quant_lib.fake_quant(value, scale, zero_point, width)

    trace = _trace(apply, variables, images, also)
    return _run(trace, lowering, variables, images, visit)

  return Quantized(quantized_apply, calibrated, *structure)
