"""What each bit costs: the rise of the loss by one quantizer at one width.

Four estimates, each a table [N, K] whose entries are added up over the
quantizers of a configuration. All but the measured one look at the float
network and at what quantization changes in it, a step d for each quantizer and
width: of a weight with the shift that the bank adds to its product, of an
activation at every example.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from nemo_jax.core import batches
from nemo_jax.core.memory import in_chunks
from nemo_jax.core.types import Array, InputError, PyTree
from nemo_jax.quantization import transform
from nemo_jax.quantization.numerics import fake_quant
from nemo_jax.quantization.numerics import widths as widths_lib
from nemo_jax.quantization.trace import tracing
from nemo_jax.quantization.trace.analysis import Site


class _Values(NamedTuple):
  """Something for every operand that is quantized, and every shift."""

  operands: dict[Site, Array]  # as the operand
  shifts: dict[Site, Array]  # as a row of the bank's


def _steps(quantized, variables, bank, operands, bits) -> _Values:
  """What `bits` everywhere would change."""
  encoded = quantized.encode(variables, bits, bank)
  found = {}
  for site, value in operands.items():
    grid = encoded.grids[site.quantizer]
    factor = bank.equalizers.get(site, 1)
    codes = encoded.codes.get(site)
    if codes is None:
      codes = fake_quant.encode(value * factor, grid)
    found[site] = codes * grid.scale / factor - value
  return _Values(found, encoded.shifts)


def _inner(quantized, left: _Values, right: _Values) -> Array:
  """float32[N]: inner products by quantizer."""
  out = jnp.zeros(len(quantized.quantizers))
  for a, b in zip(left, right, strict=True):
    for site in a:
      product = jnp.sum(a[site].astype(jnp.float32) * b[site])
      out = out.at[site.quantizer].add(product)
  return out


def _around(quantized, variables, bank, inputs):
  """The logits as a function of steps, no steps, and the operands."""

  def forward(steps):
    seen = {}

    def visit(site, value):
      seen[site] = value
      step = steps.operands.get(site)
      value = value if step is None else value + step
      return value, steps.shifts.get(site)

    logits = quantized.map_operands(variables, inputs, visit)
    return logits.astype(jnp.float32), seen

  _, shapes = jax.eval_shape(forward, _Values({}, {}))
  zeros = lambda x: jnp.zeros(x.shape, x.dtype)
  none = _Values(
    jax.tree.map(zeros, shapes),
    {s: zeros(x[0]) for s, x in bank.shifts.items()},
  )
  return forward, none


def _at_widths(quantized, variables, bank, operands, widths, of) -> Array:
  """[N, K]: of(steps), which is [N], at every width."""
  count = len(quantized.quantizers)

  def one(width):
    bits = jnp.full(count, width)
    return of(_steps(quantized, variables, bank, operands, bits))

  return jax.lax.map(one, jnp.asarray(widths)).T


def _check(quantized, variables, inputs, widths) -> None:
  quantized.structure.num_classes()
  tracing.check_arguments(variables, inputs)
  known = np.asarray(widths)
  if not np.issubdtype(known.dtype, np.integer) or not (
    len(known) and known.min() >= widths_lib.MIN_BITS
  ):
    raise InputError(
      f'widths are {list(widths)}; give one or more whole numbers from '
      f'{widths_lib.MIN_BITS}'
    )


def _total(of, quantized, variables, inputs, labels, key, chunk, title):
  """The sum of of(variables, bank, inputs, labels, key) over chunks."""
  of, total = jax.jit(of), None
  starts = range(0, batches.size(inputs), chunk)
  for i, start in enumerate(
    tqdm.tqdm(starts, desc=title, unit='chunk', disable=None)
  ):
    rows = slice(start, start + chunk)
    found = of(
      variables,
      quantized.bank,
      batches.on_device(batches.take(inputs, rows)),
      jnp.asarray(labels[rows]),
      jax.random.fold_in(key, i),
    )
    total = found if total is None else total + found
  return total


def _slopes(quantized, variables, bank, inputs, key, draws: int):
  """Draws of v' J, and the operands; see `second_order`.

  With random signs s, v = sqrt(p) s - p (sqrt(p)' s).
  """
  forward, none = _around(quantized, variables, bank, inputs)
  logits, pull, operands = jax.vjp(forward, none, has_aux=True)
  root = jnp.exp(jax.nn.log_softmax(logits) / 2)

  def draw(key):
    signs = jax.random.rademacher(key, logits.shape, jnp.float32)
    inner = jnp.sum(root * signs, axis=-1, keepdims=True)
    (slope,) = pull(root * signs - root**2 * inner)
    return slope

  return jax.vmap(draw)(jax.random.split(key, draws)), operands


def second_order(
  quantized: transform.Quantized,
  variables: PyTree,
  inputs: PyTree,
  labels: Array,
  *,
  key: Array,
  widths: Sequence[int],
  chunk: int = 8,
  draws: int = 2,
) -> Array:
  """float32[N, K]: d' H d / 2 with the Gauss-Newton form of the Hessian.

  MPQCO (arXiv 2110.06554, equation 7). H is the mean over examples of J' A J,
  with J the derivative of the logits and A = diag(p) - p p' the Hessian of the
  cross entropy, and d' J' A J d is E[(v' J d)^2] for random v with E[v v'] = A.
  Those of different examples are independent, so the square of the sum of
  v' J d over a chunk is, in the mean, the sum of the squares: one gradient a
  draw serves all quantizers and widths.

  Args:
    quantized: from `quantize` or `reconstruct`; its bank gives the steps.
    variables: of the network.
    inputs: a pytree of arrays [B, ...].
    labels: [B] int; not used here.
    key: of the signs.
    widths: K bit-widths.
    chunk: examples at once.
    draws: of signs for each chunk.
  """
  _check(quantized, variables, inputs, widths)

  def of(variables, bank, part, labels, key):
    del labels
    slopes, operands = _slopes(quantized, variables, bank, part, key, draws)

    def square(steps):
      inner = jax.vmap(lambda slope: _inner(quantized, slope, steps))(slopes)
      return jnp.mean(inner**2, axis=0)

    return _at_widths(quantized, variables, bank, operands, widths, square)

  total = _total(
    of, quantized, variables, inputs, labels, key, chunk, 'second order'
  )
  return total / (2 * batches.size(inputs))


def first_order(
  quantized: transform.Quantized,
  variables: PyTree,
  inputs: PyTree,
  labels: Array,
  *,
  key: Array,
  widths: Sequence[int],
  chunk: int = 8,
) -> Array:
  """float32[N, K]: |g' d|, with g the gradient of the mean cross entropy.

  Arguments as for `second_order`; `key` is not used.
  """
  _check(quantized, variables, inputs, widths)

  def of(variables, bank, part, labels, key):
    del key
    forward, none = _around(quantized, variables, bank, part)
    logits, pull, operands = jax.vjp(forward, none, has_aux=True)
    target = jax.nn.one_hot(labels, logits.shape[-1])
    (slope,) = pull(jax.nn.softmax(logits) - target)
    inner = functools.partial(_inner, quantized, slope)
    return _at_widths(quantized, variables, bank, operands, widths, inner)

  total = _total(
    of, quantized, variables, inputs, labels, key, chunk, 'first order'
  )
  return jnp.abs(total) / batches.size(inputs)


def hessian_trace(
  quantized: transform.Quantized,
  variables: PyTree,
  inputs: PyTree,
  labels: Array,
  *,
  key: Array,
  widths: Sequence[int],
  chunk: int = 8,
  draws: int = 2,
) -> Array:
  """float32[N, K]: the mean of H's diagonal times |d|^2 / 2.

  HAWQ-V2 (arXiv 1911.03852), of the Hessian in its Gauss-Newton form, as in
  `second_order`. The trace of J' A J is E[|v' J|^2]: Hutchinson's estimate with
  the random signs in the logits, where one gradient serves all quantizers. With
  signs in the weights it takes a product with H for each of them. Shifts are
  left out. Arguments as for `second_order`.
  """
  _check(quantized, variables, inputs, widths)

  def of(variables, bank, part, labels, key):
    del labels
    slopes, operands = _slopes(quantized, variables, bank, part, key, draws)

    def length(values):
      values = values._replace(shifts={})
      return _inner(quantized, values, values)

    def square(slope):
      # What is used twice in one shape is one tensor, with the sum as slope.
      total = {}
      for site, value in slope.operands.items():
        at = site.quantizer, value.shape
        total[at] = total.get(at, 0) + value.astype(jnp.float32)
      out = jnp.zeros(len(quantized.quantizers))
      for (quantizer, _), value in total.items():
        out = out.at[quantizer].add(jnp.sum(value**2))
      return out

    trace = jnp.mean(jax.vmap(square)(slopes), axis=0)
    lengths = _at_widths(quantized, variables, bank, operands, widths, length)
    sizes = jnp.zeros_like(trace)
    for site, value in operands.items():
      sizes = sizes.at[site.quantizer].add(value.size)
    return jnp.stack([trace, sizes, *lengths.T], axis=1)

  total = _total(
    of, quantized, variables, inputs, labels, key, chunk, 'Hessian trace'
  )
  trace, sizes, lengths = total[:, :1], total[:, 1:2], total[:, 2:]
  return trace / batches.size(inputs) * (lengths / sizes) / 2


def measured(
  quantized: transform.Quantized,
  variables: PyTree,
  inputs: PyTree,
  labels: Array,
  *,
  key: Array,
  widths: Sequence[int],
  chunk: int = 64,
) -> Array:
  """float32[N, K]: the divergence from the float network, nothing estimated.

  Kullback-Leibler, the mean over examples, with one quantizer at one width and
  all others in float: N K evaluations. Arguments as for `second_order`; `key`
  and `labels` are not used.
  """
  del key, labels
  _check(quantized, variables, inputs, widths)
  count = len(quantized.quantizers)

  @jax.jit
  def score(variables, bank, inputs, target, bits):
    encoded = quantized.encode(variables, bits, bank)
    run = lambda part: quantized.run(variables, part, encoded)
    logits = in_chunks(run, inputs, chunk).astype(jnp.float32)
    gap = jax.nn.log_softmax(target) - jax.nn.log_softmax(logits)
    return jnp.mean(jnp.sum(jax.nn.softmax(target) * gap, axis=-1))

  run = jax.jit(
    lambda variables, inputs: in_chunks(
      lambda part: quantized.map_operands(variables, part), inputs, chunk
    )
  )
  inputs = batches.on_device(inputs)
  target = run(variables, inputs).astype(jnp.float32)
  everywhere = jnp.full(count, widths_lib.WIDTHS[-1] + 1)
  cells = [(i, k) for i in range(count) for k in range(len(widths))]
  table = jnp.zeros((count, len(widths)))
  for i, k in tqdm.tqdm(cells, desc='measured', unit='eval', disable=None):
    bits = everywhere.at[i].set(widths[k])
    value = score(variables, quantized.bank, inputs, target, bits)
    table = table.at[i, k].set(value)
  return table


METHODS: dict[str, Callable[..., Array]] = {
  'second_order': second_order,
  'first_order': first_order,
  'hessian_trace': hessian_trace,
  'measured': measured,
}


def passes(method: str, quantizers: int, widths: int) -> int:
  """Forward passes over the inputs that a method costs, by their arithmetic.

  At the methods' default draws. A gradient counts as two more passes.

  Args:
    method: one of METHODS, or `none`.
    quantizers: N.
    widths: K.
  """
  return {
    'none': 0,
    'first_order': 3,
    'second_order': 5,
    'hessian_trace': 5,
    'measured': 1 + quantizers * widths,
  }[method]
