"""A bank of quantized weights: the best codes of every layer at every width.

One pass over images collects, for every matrix product, the mean and the second
moments of what its weight multiplies. With those the error that quantization
leaves in the layer's output is known without the images, and the codes are
chosen to make it small, layer by layer and for all widths at once.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from nemo_jax.base import Array, InputError, PyTree
from nemo_jax.quantization import calibrate, transform
from nemo_jax.quantization.analysis import Site
from nemo_jax.quantization.program import Equation

# Widths that a bank has codes for; wider ones are rounded when needed.
WIDTHS = tuple(range(2, 9))
STEPS = ('scales', 'rounding', 'bias')
DEFAULT_STEPS = STEPS
# Added to the diagonal of the second moments, as a share of its mean: what was
# not seen in the sample may occur.
DAMPING = 0.01
# Rows of a weight that are rounded before the rest is told.
BLOCK = 128


class Moments(NamedTuple):
  """Of the inputs of a product, laid out as rows of D for each of G groups."""

  count: Array  # float32[], rows seen
  total: Array  # float32[G, D], their sum
  square: Array  # float32[G, D, D], the sum of their outer products


def _is_plain(equation: Equation) -> bool:
  """Whether it is a product that is understood here: x @ w, or NHWC, HWIO."""
  numbers = equation.params['dimension_numbers']
  if equation.name == 'dot_general':
    (left, right), batched = numbers
    shapes = [v.aval.shape for v in equation.eqn.invars]
    last = (len(shapes[0]) - 1,)
    return batched == ((), ()) and (tuple(left), tuple(right)) == (last, (0,))
  rank = len(numbers.lhs_spec)
  inner = tuple(range(1, rank - 1))
  layout = (0, rank - 1, *inner), (rank - 1, rank - 2, *range(rank - 2))
  return (
    (tuple(numbers.lhs_spec), tuple(numbers.rhs_spec)) == layout
    and tuple(numbers.out_spec) == layout[0]
    and equation.params['batch_group_count'] == 1
    and set(equation.params['lhs_dilation']) == {1}
  )


def _groups(equation: Equation) -> int:
  return equation.params.get('feature_group_count', 1)


def as_matrices(equation: Equation, weight: Array) -> Array:
  """A weight [..., C], or any array laid out like it, as [G, D, C / G]."""
  groups = _groups(equation)
  flat = weight.reshape(-1, groups, weight.shape[-1] // groups)
  return jnp.swapaxes(flat, 0, 1)


def _as_weight(matrices: Array, shape: tuple[int, ...]) -> Array:
  return jnp.swapaxes(matrices, 0, 1).reshape(shape)


def _rows(equation: Equation, inputs: Array) -> Array:
  """[G, n, D]: what meets each row of the weight, at every output position."""
  if equation.name == 'dot_general':
    return inputs.reshape(1, -1, inputs.shape[-1])
  params = equation.params
  window = equation.eqn.invars[1].aval.shape[:-2]
  steps = zip(
    window, params['rhs_dilation'], params['window_strides'], strict=True
  )
  edges = [(low, high, 0) for low, high in params['padding']]
  zero = jnp.zeros((), inputs.dtype)
  inputs = jax.lax.pad(inputs, zero, [(0, 0, 0), *edges, (0, 0, 0)])
  spans = []
  for size, (taps, dilation, stride) in zip(
    inputs.shape[1:-1], steps, strict=True
  ):
    last = size - (taps - 1) * dilation
    spans.append(
      [slice(i * dilation, i * dilation + last, stride) for i in range(taps)]
    )
  parts = [
    inputs[(slice(None), *(s[i] for s, i in zip(spans, index, strict=True)))]
    for index in np.ndindex(*window)
  ]
  groups = _groups(equation)
  taps = jnp.stack(parts, axis=-2)  # [B, ..., taps, channels]
  taps = taps.reshape(-1, len(parts), groups, taps.shape[-1] // groups)
  return jnp.moveaxis(taps, 2, 0).reshape(groups, len(taps), -1)


def _moments_of(equation: Equation, inputs: Array) -> Moments:
  rows = _rows(equation, inputs.astype(jnp.float32))
  square = jax.lax.dot_general(rows, rows, (((1,), (1,)), ((0,), (0,))))
  return Moments(jnp.float32(rows.shape[1]), jnp.sum(rows, axis=1), square)


def collect_moments(
  quantized: transform.Quantized, variables: PyTree, images: Array, chunk: int
) -> dict[Site, Moments]:
  """The moments of every product that is understood, by its weight's site.

  Args:
    quantized: from `quantize`; the network runs in float.
    variables: its weights.
    images: [B, ...].
    chunk: of them at once.
  """
  products = {
    site: equation
    for site, equation in quantized.products.items()
    if _is_plain(equation) and site.operand == 1
  }
  by_equation = {site.equation: site for site in products}

  @jax.jit
  def collect(variables, part):
    seen = {}

    def visit(site, value):
      of = by_equation.get(site.equation)
      if of is not None and site.operand != of.operand:
        seen[of] = _moments_of(products[of], value)
      return value

    quantized.intercept(variables, part, visit)
    return seen

  add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b), donate_argnums=0)
  total = None
  starts = range(0, len(images), chunk)
  for start in tqdm.tqdm(
    starts, desc='second moments', unit='chunk', disable=None
  ):
    seen = collect(variables, jnp.asarray(images[start : start + chunk]))
    total = seen if total is None else add(total, seen)
  return total


def _error(square: Array, gap: Array) -> Array:
  """[..., C]: what gap [..., D, C] leaves in the output, squared and summed."""
  return jnp.sum(gap * (square @ gap), axis=-2)


def _nearest_plane(weight, factor, scale, low, high) -> Array:
  """Codes [D, C] whose error the later rows make up for.

  Babai's nearest plane: with R upper triangular and R'R the second moments,
  the error |R (w - q)|^2 is minimised row by row from the last to the first,
  each rounded after it has taken over what the rows behind it left. It is the
  rule of OBQ and GPTQ (Frantar et al. 2022) without an inverse.

  Args:
    weight: [D, C].
    factor: [D, D], R with rows divided by their diagonal.
    scale: [1, C].
    low: least code.
    high: greatest.
  """
  depth, size = len(weight), min(BLOCK, len(weight))
  blocks = -(-depth // size)
  padding = blocks * size - depth
  # In front, where rows come last; they see all others and change none.
  weight = jnp.pad(weight, ((padding, 0), (0, 0)))
  factor = jnp.pad(factor, ((padding, 0), (padding, 0)))

  def round_block(index, carry):
    left, codes = carry
    start = (blocks - 1 - index) * size
    rows = jax.lax.dynamic_slice_in_dim(factor, start, size)
    own = jax.lax.dynamic_slice_in_dim(rows, start, size, axis=1)
    exact = jax.lax.dynamic_slice_in_dim(weight, start, size)
    # Rows that are still to come have left nothing yet.
    goal = exact + rows @ left

    def round_row(i, carry):
      gap, held = carry
      row = size - 1 - i
      value = goal[row] + own[row] @ gap
      code = jnp.clip(jnp.round(value / scale[0]), low, high)
      gap = gap.at[row].set(exact[row] - code * scale[0])
      return gap, held.at[row].set(code)

    zeros = jnp.zeros_like(exact)
    gap, held = jax.lax.fori_loop(0, size, round_row, (zeros, zeros))
    put = functools.partial(
      jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=0
    )
    return put(left, gap), put(codes, held)

  zeros = jnp.zeros_like(weight)
  _, codes = jax.lax.fori_loop(0, blocks, round_block, (zeros, zeros))
  return codes[padding:]


def _reconstruct_group(weight, square, scales, lows, highs) -> Array:
  """[K, D, C]: the better of nearest plane and nearest, for each output.

  Args:
    weight: [D, C].
    square: [D, D], second moments of the inputs.
    scales: [K, 1, C].
    lows: [K], least codes.
    highs: [K].
  """
  diagonal = jnp.diag(square)
  mean = jnp.mean(diagonal)
  # An input that is always zero takes any weight; rounding is as good as any.
  damping = DAMPING * jnp.where(mean > 0, mean, 1.0)
  # Strong inputs go first, that is last, while others can still make up.
  order = jnp.argsort(diagonal)
  damped = square + damping * jnp.eye(len(diagonal))
  factor = jnp.linalg.cholesky(damped[order][:, order], upper=True)
  factor = factor / jnp.diag(factor)[:, None]

  def one(scale, low, high):
    plain = jnp.clip(jnp.round(weight / scale), low, high)
    found = _nearest_plane(weight[order], factor, scale, low, high)
    found = jnp.zeros_like(found).at[order].set(found)
    before, after = (
      _error(square, weight - codes * scale) for codes in (plain, found)
    )
    return jnp.where(after < before, found, plain)

  return jax.vmap(one)(scales, lows, highs)


@functools.partial(jax.jit, static_argnames=('at_once', 'steps'))
def _reconstruct(weight, moments, scales, lows, highs, at_once, steps):
  """Codes [G, K, D, C] int8 and shifts [G, K, C] of one layer."""

  def one(inputs):
    weight, moments, scales = inputs
    mean = moments.total / moments.count
    square = moments.square / moments.count
    if 'bias' in steps:
      # The mean of the error is made up for by a shift, the rest is not.
      square = square - jnp.outer(mean, mean)
    if 'rounding' in steps:
      codes = _reconstruct_group(weight, square, scales, lows, highs)
    else:
      codes = jax.vmap(
        lambda s, low, high: jnp.clip(jnp.round(weight / s), low, high)
      )(scales, lows, highs)
    gap = weight - codes * scales
    shift = jnp.einsum('d,kdc->kc', mean, gap)
    shift = shift if 'bias' in steps else jnp.zeros_like(shift)
    return codes.astype(jnp.int8), shift

  counts = jnp.broadcast_to(moments.count, weight.shape[:1])
  moments = moments._replace(count=counts)
  return jax.lax.map(one, (weight, moments, scales), batch_size=at_once)


def _check(steps: Sequence[str]) -> None:
  for step in steps:
    if step not in STEPS:
      raise InputError(
        f'unknown step {step!r}; the choices are {", ".join(STEPS)}'
      )


def reconstruct(
  quantized: transform.Quantized,
  variables: PyTree,
  images: Array,
  *,
  steps: Sequence[str] = DEFAULT_STEPS,
  chunk: int = 16,
) -> transform.Quantized:
  """The network with a bank of weights that were chosen by their outputs.

  Symmetric weights of convolutions and dense layers alone; others, and weights
  that are used more than once, are rounded to nearest as before.

  Args:
    quantized: from `quantize`.
    variables: its weights.
    images: [B, ...], a sample; about a thousand are enough.
    steps: `scales` weighs the squared error of a weight, which its scale
      minimises, by the power of the input it multiplies; `rounding` chooses
      codes by the error of the layer's output (see `_nearest_plane`), never
      worse than nearest on these images; `bias` makes up for the mean of that
      error (Nagel et al. 2019).
    chunk: images at once.

  Raises:
    InputError: a step is unknown, or there is no image.
  """
  _check(steps)
  if not len(images):
    raise InputError('reconstruct needs at least one image')
  moments = collect_moments(quantized, variables, images, chunk)
  weights = quantized.weights(variables)
  uses = [site.quantizer for site in quantized.products]
  ranges = list(quantized.bank.ranges)
  rows = slice(WIDTHS[0] - calibrate.WIDTHS[0], len(WIDTHS))
  codes, shifts = {}, {}
  for site in tqdm.tqdm(
    moments, desc='reconstruction', unit='layer', disable=None
  ):
    quantizer = quantized.quantizers[site.quantizer]
    if uses.count(site.quantizer) > 1 or not quantizer.channel_axes:
      continue
    weight, seen = weights[site], moments[site]
    equation = quantized.products[site]
    matrices = as_matrices(equation, weight)
    if 'scales' in steps:
      power = jax.vmap(jnp.diag)(seen.square) / seen.count
      power = jnp.broadcast_to(power[..., None], matrices.shape)
      ranges[site.quantizer] = calibrate.weight_range(
        weight,
        quantizer.channel_axes,
        power=_as_weight(power, weight.shape),
      )
    table = ranges[site.quantizer]
    scales = table.scale[rows]
    if scales[0].size == 1:
      continue
    zero = table.zero_point[rows].reshape(len(WIDTHS), -1)[:, 0]
    last = jnp.asarray([2.0**b - 1 for b in WIDTHS])
    spread = jnp.broadcast_to(scales, (len(WIDTHS), *weight.shape))
    spread = jax.vmap(functools.partial(as_matrices, equation))(spread)
    spread = jnp.moveaxis(spread[:, :, :1], 1, 0)  # [G, K, 1, C]
    groups, depth = matrices.shape[:2]
    found, shift = _reconstruct(
      matrices,
      seen,
      spread,
      -zero,
      last - zero,
      at_once=max(1, min(groups, 2**20 // depth**2)),
      steps=tuple(steps),
    )
    restore = lambda x, shape=weight.shape: _as_weight(x, shape)
    codes[site] = jax.vmap(restore, in_axes=1)(found)
    shifts[site] = jnp.swapaxes(shift, 0, 1).reshape(scales.shape)
  bank = transform.Bank(tuple(ranges), codes, shifts)
  return quantized.with_bank(bank)
