"""Cross-layer equalization: the channels of a tensor get similar ranges.

Nagel et al. 2019 (arXiv 1906.04721), section 4.1: between two layers, a channel
may be divided by any positive factor, and the weights that it is multiplied
with multiplied by the same factor, if the operations in between commute with
the division. The first layer, its norm and the bounds of its activation
function would absorb the division. Here they are not rewritten: instead, the
input of the second layer is divided before it is quantized.
"""

import jax.extend as jex
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from nemo_jax.core.types import Array, ArrayLike
from nemo_jax.quantization import transform
from nemo_jax.quantization.ptq.layers import Layer, Moments
from nemo_jax.quantization.trace.equations import (
  MATRIX_PRODUCTS,
  Equation,
  sub_jaxprs,
)
from nemo_jax.quantization.trace.program import Program

# Outputs scale with the input if the other operand, which is added or compared,
# is scaled too.
_AFFINE = ('add', 'sub', 'mul', 'div')
_CLIPS = ('max', 'min', 'clamp')
_PASSING = (
  'convert_element_type',
  'copy',
  'name',
  'pad',
  'reduce_window_max',
  'reshape',
  'squeeze',
)
# Exponents of the ranges of a channel and of its weights in the factors to try.
# Two zeros leave the layer as it is; two halves are Nagel's factors.
EXPONENTS = tuple(np.linspace(0, 1, 5))
# A channel with less than this share of the largest range counts as dead; its
# range is then taken to be this share.
_DEAD = 1e-4


def _clips(eqn: jex.core.JaxprEqn) -> bool:
  """Whether an equation, with all equations inside, does no more than clip."""
  subs = sub_jaxprs(eqn)
  if subs:
    return all(_clips(e) for s in subs for e in s.eqns)
  return eqn.primitive.name in (*_CLIPS, 'convert_element_type', 'copy')


def _commutes(equation: Equation, moving: list[int]) -> bool:
  """Whether outputs are scaled by channel if the inputs are.

  Args:
    equation: any equation.
    moving: the operands that depend on the examples, whose channels are scaled.
  """
  if equation.name in ('sub', 'div') and moving != [0]:
    return False
  if equation.name in (*_AFFINE, *_CLIPS):
    return len(moving) == 1
  return equation.name in _PASSING or (
    bool(sub_jaxprs(equation.eqn)) and _clips(equation.eqn)
  )


def _is_free(program: Program, slot: int) -> bool:
  """Whether one layer computes a slot, for one use, and could scale it."""
  moving = set(program.examples)  # slots that depend on the examples
  maker: dict[int, Equation] = {}
  uses: dict[int, int] = {}
  for equation in program.equations:
    for source in set(equation.inputs):
      uses[source] = uses.get(source, 0) + 1
    if not moving.isdisjoint(equation.inputs):
      moving |= set(equation.outputs)
    maker |= dict.fromkeys(equation.outputs, equation)
  while slot in maker:
    equation = maker[slot]
    last_axis = program.avals[slot].shape[-1:]
    sources = [i for i, s in enumerate(equation.inputs) if s in moving]
    if uses[slot] > 1 or slot in program.outputs:
      return False
    if equation.name in MATRIX_PRODUCTS:
      return len(sources) == 1
    if not _commutes(equation, sources) or len(sources) != 1:
      return False
    slot = equation.inputs[sources[0]]
    if program.avals[slot].shape[-1:] != last_axis:
      return False
  return False


def free_layers(
  quantized: transform.Quantized, layers: list[Layer]
) -> list[Layer]:
  """Layers whose input one other layer computes for them alone.

  That layer could scale the channels of the input, as the operations in between
  commute with it.
  """
  sites = [site.quantizer for site in quantized.analysis.sites]
  return [
    layer
    for layer in layers
    if sites.count(layer.input.quantizer) == 1
    and _is_free(quantized.program, layer.equation.inputs[0])
  ]


def factors(
  layer: Layer, weight: Float[ArrayLike, '... C'], moments: Moments
) -> Float[Array, ' channels']:
  """Factors that divide each channel of a layer's input, powers of two.

  They are r^a / w^b, with r the largest value of a channel and w the largest
  weight that it is multiplied with, rounded to powers of two, with which
  division is exact. The exponents, two of EXPONENTS, are those of least error
  in the output. The error is that of uniform rounding with equal widths: the
  rounding error of each output's weights times the power of the inputs, plus
  that of the input times the power of the weights.

  Args:
    layer: from `free_layers`.
    weight: its weight.
    moments: moments of its input.
  """
  largest = lambda rows: jnp.max(layer.by_channel(rows), axis=0)
  matrices = layer.as_matrices(weight)
  span = largest(jnp.maximum(jnp.abs(moments.low), jnp.abs(moments.high)))
  force = largest(jnp.max(jnp.abs(matrices), axis=-1))
  span, force = (jnp.maximum(x, _DEAD * jnp.max(x)) for x in (span, force))
  alive = (span > 0) & (force > 0)
  span, force = jnp.where(alive, span, 1), jnp.where(alive, force, 1)
  power = jnp.diagonal(moments.square, axis1=1, axis2=2) / moments.count

  def error(factor):
    spread = layer.to_inputs(factor)
    scaled = matrices * spread[..., None]
    # Signed codes span twice the largest weight.
    steps = 2 * jnp.max(jnp.abs(scaled), axis=1) / jnp.sqrt(12)
    weights = jnp.sum(
      jnp.sum(steps**2, axis=-1) * jnp.sum(power / spread**2, axis=-1)
    )
    ends = [moments.high / spread, -moments.low / spread]
    step = sum(jnp.maximum(jnp.max(x), 0) for x in ends) / jnp.sqrt(12)
    return weights + step**2 * jnp.sum(scaled**2)

  tried = []
  for a in EXPONENTS:
    for b in EXPONENTS:
      factor = span**a / force**b
      factor = factor / jnp.exp(jnp.mean(jnp.log(factor)))
      tried.append(2.0 ** jnp.round(jnp.log2(factor)))
  errors = jnp.stack([error(factor) for factor in tried])
  return jnp.stack(tried)[jnp.argmin(errors)]
