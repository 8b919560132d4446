"""Sensitivities: the rise of the loss by each quantizer at each bit-width.

Four estimates, each a table [N, K] of N quantizers and K widths. The rise of a
configuration is the sum of its entries. All but the measured one are computed
at the float network from a step d for each quantizer and width: the change that
quantization makes to a weight, with the shift that the bank adds to its
product, or to an activation of every example. See `perturbations`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jaxtyping import Float

from nemo_jax.core import batches
from nemo_jax.core.memory import in_chunks
from nemo_jax.core.types import Array, ArrayLike, InputError, PyTree
from nemo_jax.quantization import perturbations
from nemo_jax.quantization.numerics import widths as widths_lib
from nemo_jax.quantization.numerics.bank import Bank
from nemo_jax.quantization.perturbations import Steps
from nemo_jax.quantization.quantized import Quantized
from nemo_jax.quantization.trace import tracing
from nemo_jax.quantization.trace.analysis import Site


def _check(
  quantized: Quantized, variables: PyTree, inputs: PyTree, widths: Any
) -> None:
  """Raises `InputError` for arguments that sensitivities cannot be found of."""
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


def _total(
  of: Callable[[PyTree, Bank, PyTree, Array, Array], Array],
  quantized: Quantized,
  variables: PyTree,
  inputs: PyTree,
  labels: Any,
  key: Array,
  chunk: int,
  title: str,
) -> Array:
  """The sum of of(variables, bank, inputs, labels, key) over chunks of inputs.

  Each chunk has a random key of its own. The bar of progress shows the title.
  """
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
  assert total is not None  # there is at least one example
  return total


def _slopes(
  quantized: Quantized,
  variables: PyTree,
  bank: Bank,
  inputs: PyTree,
  key: Array,
  draws: int,
) -> tuple[Steps, dict[Site, ArrayLike]]:
  """Draws of v' J, with an axis of draws in front; and the float operands.

  See `second_order`: v = sqrt(p) s - p (sqrt(p)' s) with random signs s.
  """
  forward, none = perturbations.around(quantized, variables, bank, inputs)
  logits, pull, operands = jax.vjp(forward, none, has_aux=True)
  root = jnp.exp(jax.nn.log_softmax(logits) / 2)

  def draw(key):
    signs = jax.random.rademacher(key, logits.shape, jnp.float32)
    inner = jnp.sum(root * signs, axis=-1, keepdims=True)
    (slope,) = pull(root * signs - root**2 * inner)
    return slope

  return jax.vmap(draw)(jax.random.split(key, draws)), operands


def second_order(
  quantized: Quantized,
  variables: PyTree,
  inputs: PyTree,
  labels: ArrayLike | Sequence[int],
  *,
  key: Array,
  widths: Sequence[int] | ArrayLike,
  chunk: int = 8,
  draws: int = 2,
) -> Float[Array, 'N K']:
  """Second-order rise of the loss, d' H d / 2, with the Gauss-Newton Hessian.

  MPQCO (arXiv 2110.06554, equation 7). H is the mean over examples of J' A J,
  with J the derivative of the logits and A = diag(p) - p p' the Hessian of the
  cross entropy. For random v with E[v v'] = A, d' J' A J d is E[(v' J d)^2]. As
  v is independent between examples, the square of the sum of v' J d over a
  chunk has the same mean as the sum of the squares. So one gradient for each
  draw is enough for all quantizers and widths.

  Args:
    quantized: from `quantize` or `reconstruct`; its bank gives the steps.
    variables: of the network.
    inputs: a pytree of arrays [B, ...].
    labels: [B] int; not used by this method.
    key: random key of the signs.
    widths: K bit-widths.
    chunk: examples that are run at once.
    draws: number of draws of the signs for each chunk.

  Raises:
    InputError: there is no example, a width is no integer from 2, or the
      outputs of the network are not logits.
  """
  _check(quantized, variables, inputs, widths)

  def of(variables, bank, part, labels, key):
    del labels
    slopes, operands = _slopes(quantized, variables, bank, part, key, draws)

    def square(steps):
      inner = jax.vmap(
        lambda slope: perturbations.inner(quantized, slope, steps)
      )(slopes)
      return jnp.mean(inner**2, axis=0)

    return perturbations.at_widths(
      quantized, variables, bank, operands, widths, square
    )

  total = _total(
    of, quantized, variables, inputs, labels, key, chunk, 'second order'
  )
  return total / (2 * batches.size(inputs))


def first_order(
  quantized: Quantized,
  variables: PyTree,
  inputs: PyTree,
  labels: ArrayLike | Sequence[int],
  *,
  key: Array,
  widths: Sequence[int] | ArrayLike,
  chunk: int = 8,
) -> Float[Array, 'N K']:
  """First-order change of the loss, |g' d|, with the gradient g.

  The loss is the mean cross entropy of the labels. Arguments and errors are
  those of `second_order`; `key` is not used.
  """
  _check(quantized, variables, inputs, widths)

  def of(variables, bank, part, labels, key):
    del key
    forward, none = perturbations.around(quantized, variables, bank, part)
    logits, pull, operands = jax.vjp(forward, none, has_aux=True)
    target = jax.nn.one_hot(labels, logits.shape[-1])
    (slope,) = pull(jax.nn.softmax(logits) - target)
    inner = functools.partial(perturbations.inner, quantized, slope)
    return perturbations.at_widths(
      quantized, variables, bank, operands, widths, inner
    )

  total = _total(
    of, quantized, variables, inputs, labels, key, chunk, 'first order'
  )
  return jnp.abs(total) / batches.size(inputs)


def hessian_trace(
  quantized: Quantized,
  variables: PyTree,
  inputs: PyTree,
  labels: ArrayLike | Sequence[int],
  *,
  key: Array,
  widths: Sequence[int] | ArrayLike,
  chunk: int = 8,
  draws: int = 2,
) -> Float[Array, 'N K']:
  """Mean of the Hessian's diagonal times |d|^2 / 2.

  HAWQ-V2 (arXiv 1911.03852), with the Gauss-Newton Hessian of `second_order`.
  The trace of J' A J is E[|v' J|^2], which is Hutchinson's estimate with random
  signs in the logits: one gradient is enough for all quantizers, while signs in
  the weights would take a product with H for each quantizer. Shifts are left
  out. Arguments and errors are those of `second_order`.
  """
  _check(quantized, variables, inputs, widths)

  def of(variables, bank, part, labels, key):
    del labels
    slopes, operands = _slopes(quantized, variables, bank, part, key, draws)

    def length(values):
      values = values._replace(shifts={})
      return perturbations.inner(quantized, values, values)

    def square(slope):
      # Uses of a tensor in one shape are one tensor, with the sum as slope.
      total: dict[Any, Any] = {}
      for site, value in slope.operands.items():
        at = site.quantizer, value.shape
        total[at] = total.get(at, 0) + value.astype(jnp.float32)
      out = jnp.zeros(len(quantized.quantizers))
      for (quantizer, _), value in total.items():
        out = out.at[quantizer].add(jnp.sum(value**2))
      return out

    trace = jnp.mean(jax.vmap(square)(slopes), axis=0)
    lengths = perturbations.at_widths(
      quantized, variables, bank, operands, widths, length
    )
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
  quantized: Quantized,
  variables: PyTree,
  inputs: PyTree,
  labels: ArrayLike | Sequence[int],
  *,
  key: Array,
  widths: Sequence[int] | ArrayLike,
  chunk: int = 64,
) -> Float[Array, 'N K']:
  """Measured Kullback-Leibler divergence from the float network.

  It is the mean over examples, with one quantizer at one width and all others
  in float: N K evaluations. Arguments and errors are those of `second_order`;
  `key` and `labels` are not used.
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
  """Number of forward passes over the inputs that a method costs.

  With the default number of draws. A gradient counts as two more passes.

  Args:
    method: one of METHODS, or `none`, which costs nothing.
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
