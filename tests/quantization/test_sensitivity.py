"""Sensitivities against derivatives that are written out."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemo_jax import quantize
from nemo_jax.core.types import InputError
from nemo_jax.quantization import sensitivity
from nemo_jax.quantization.ptq import reconstruct
from nemo_jax.quantization.quantized import Quantized
from tests.quantization.networks import normal

CHANGING = (2, 3, 6)
# The last is beyond the widest quantizer and changes nothing.
WIDTHS = (*CHANGING, 16, 17)
CLASSES = 5


def conv(x, kernel):
  return jax.lax.conv_general_dilated(
    x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
  )


def as_it_is(name, value):
  return value


def chain(v, x, put=as_it_is):
  """Two convolutions, whose channels can be equalized, and a dense layer.

  `put` replaces what a quantizer sees, and the output of its weight.
  """
  x = conv(put('a:input', x), put('a', v['a']))
  x = jax.nn.relu(put('a:output', x) + 0.3)
  x = conv(put('b:input', x), put('b', v['b']))
  x = jax.nn.relu(put('b:output', x) - 0.1).reshape(len(x), -1)
  return put('c:output', put('c:input', x) @ put('c', v['c']))


def twice(v, x, put=as_it_is):
  """A weight is used twice, and so is an activation."""
  x = x.reshape(len(x), -1)[:, :5]
  x = jax.nn.relu(put('a:input', x) @ put('a', v['a']) + 0.3)
  left = put('a#2:input', x) @ put('a', v['a'])
  right = put('b:output', put('a#2:input', x) @ put('b', v['b']))
  return left + 2 * right


SHAPES = {
  chain: {'a': (3, 3, 2, 3), 'b': (1, 1, 3, 4), 'c': (36, CLASSES)},
  twice: {'a': (5, 5), 'b': (5, CLASSES)},
}


class Case(NamedTuple):
  network: Callable
  variables: dict
  images: jax.Array
  labels: jax.Array
  quantized: Quantized

  @property
  def names(self):
    """Of the quantizers."""
    return [q.name for q in self.quantized.quantizers]


# A network, what its bank was reconstructed by, and a lowering.
CASES = {
  'chain': (chain, reconstruct.STEPS, 'backend'),
  'twice': (twice, reconstruct.DEFAULT_STEPS, 'traced'),
}


@functools.cache
def make(name):
  network, steps, lowering = CASES[name]
  shapes = SHAPES[network].items()
  variables = {
    n: normal(i, *s) * 2 / math.prod(s[:-1]) ** 0.5
    for i, (n, s) in enumerate(shapes)
  }
  images = normal(9, 6, 3, 3, 2) + 0.3
  labels = jnp.asarray([0, 3, 1, 4, 4, 2])
  quantized = quantize(network, variables, images, lowering=lowering)
  quantized = reconstruct.reconstruct(quantized, variables, images, steps=steps)
  return Case(network, variables, images, labels, quantized)


@pytest.fixture(params=CASES)
def case(request):
  return make(request.param)


def estimate(case, method, **options):
  options = {'key': jax.random.key(0), 'widths': WIDTHS, 'chunk': 3} | options
  draws = {'second_order': 2000, 'hessian_trace': 2000}
  if method in draws:
    options['draws'] = draws[method]
  table = sensitivity.METHODS[method](
    case.quantized, case.variables, case.images, case.labels, **options
  )
  assert table.shape == (len(case.names), len(options['widths']))
  assert table.dtype == jnp.float32
  return np.asarray(table)


# By hand.


def put_step(case, name, flat, image):
  """[C]: logits of an image, with a flat step of one quantizer added.

  What is left of the step once the operand is full goes to its output.
  """

  def put(at, value):
    if at == name:
      return value + flat[: value.size].reshape(value.shape)
    if at == f'{name}:output' and flat.size > case.variables[name].size:
      return value + flat[case.variables[name].size :]
    return value

  return case.network(case.variables, image[None], put)[0]


def operand(case, name):
  """What a quantizer sees of all images."""
  seen = {}

  def put(at, value):
    seen[at] = value
    return value

  case.network(case.variables, case.images, put)
  return np.asarray(seen[name], np.float64)


def rounded(table, value, width):
  """What a grid holds of a value."""
  scale, zero = (np.asarray(x[width - 2], np.float64) for x in table)
  codes = np.clip(np.round(value / scale), -zero, 2**width - 1 - zero)
  return codes * scale


def step(case, name, width):
  """[B, n] and [B, c or 0]: what a quantizer changes, and its shift.

  Of a weight in one row, for they are the same for every image.
  """
  bank, value = case.quantized.bank, operand(case, name)
  rows = 1 if name in case.variables else len(value)
  index = case.names.index(name)
  site = next(s for s in case.quantized.analysis.sites if s.quantizer == index)
  factor = np.asarray(bank.equalizers.get(site, 1), np.float64)
  shift = np.zeros((rows, 0))
  if site in bank.codes:
    row = width - 2
    scale = np.asarray(bank.ranges[index].scale[row], np.float64)
    held = np.asarray(bank.codes[site][row]) * scale / factor
    shift = np.asarray(bank.shifts[site][row])
  else:
    held = rounded(bank.ranges[index], value * factor, width) / factor
  return (held - value).reshape(rows, -1), shift.reshape(rows, -1)


def changes(case):
  """[N, K, B, C]: J d, how the logits of every image move."""
  table = []
  for name in case.names:
    steps = [np.hstack(step(case, name, width)) for width in CHANGING]
    of = lambda flat, image, name=name: put_step(case, name, flat, image)
    found = jax.jit(jax.vmap(jax.jacobian(of), (None, 0)))
    jacobian = found(jnp.zeros(steps[0].shape[1]), case.images)
    jacobian = np.asarray(jacobian, np.float64)
    table.append([np.sum(jacobian * d[:, None], axis=-1) for d in steps])
  return np.asarray(table)


def middle(case):
  """[B, C, C]: the Hessian of the cross entropy by the logits."""
  p = probabilities(case)
  return p[:, :, None] * np.eye(CLASSES) - p[:, :, None] * p[:, None]


def mean_curvature(case, name):
  """The mean of the diagonal of J' A J, over all images."""
  size = step(case, name, 2)[0].shape[1]
  of = lambda flat, image: put_step(case, name, flat, image)
  found = jax.jit(jax.vmap(jax.jacobian(of), (None, 0)))
  jacobian = np.asarray(found(jnp.zeros(size), case.images), np.float64)
  form = np.einsum('bci,bcd,bdi->bi', jacobian, middle(case), jacobian)
  return form.mean()


def probabilities(case):
  out = case.network(case.variables, case.images)
  return np.asarray(jax.nn.softmax(out), np.float64)


def exact_second_order(case):
  moved = changes(case)
  form = np.einsum('nkbc,bcd,nkbd->nkb', moved, middle(case), moved)
  return form.mean(axis=-1) / 2


def exact_first_order(case):
  slope = probabilities(case) - np.eye(CLASSES)[np.asarray(case.labels)]
  along = np.einsum('nkbc,bc->nkb', changes(case), slope)
  return np.abs(along.mean(axis=-1))


def exact_hessian_trace(case):
  table = []
  for name in case.names:
    steps = [step(case, name, width)[0] for width in CHANGING]
    squares = np.asarray([np.sum(d**2) / len(d) for d in steps])
    table.append(mean_curvature(case, name) * squares / 2)
  return np.asarray(table)


def exact_measured(case):
  """With one quantizer at one width and all others in float."""
  p, count = probabilities(case), len(case.names)
  table = np.zeros((count, len(CHANGING)))
  run = jax.jit(case.quantized.apply)
  for i, k in np.ndindex(table.shape):
    bits = jnp.full(count, 32).at[i].set(CHANGING[k])
    out = run(case.variables, case.images, bits)
    q = np.asarray(jax.nn.softmax(out), np.float64)
    table[i, k] = np.mean(np.sum(p * np.log(p / q), axis=1))
  return table


# The estimates.


@pytest.mark.slow
def test_the_banks_have_what_they_are_here_for():
  """Shifts, equalizers, and a weight that is rounded to nearest."""
  held = [make(name).quantized.bank for name in CASES]
  assert [len(b.shifts) for b in held] == [3, 1]
  assert [len(b.equalizers) for b in held] == [2, 0]


@pytest.mark.parametrize(
  ('method', 'exact', 'rtol'),
  [
    # Of draws, many.
    ('second_order', exact_second_order, 0.15),
    ('hessian_trace', exact_hessian_trace, 0.15),
    ('first_order', exact_first_order, 1e-3),
    ('measured', exact_measured, 1e-3),
  ],
)
def test_an_estimate_is_what_it_says(case, method, exact, rtol):
  """And costs nothing where nothing changes: at 16 bits, all but."""
  # Of six images, the last chunk of one case has two.
  chunk = 4 if case.network is twice else 3
  table = estimate(case, method, chunk=chunk)
  changing = table[:, : len(CHANGING)]
  np.testing.assert_allclose(changing, exact(case), rtol=rtol, atol=1e-7)
  almost = 1e-3 if method == 'first_order' else 1e-5
  assert np.all(table[:, -2] < almost * np.max(table))
  np.testing.assert_allclose(table[:, -1], 0, atol=1e-7)


def test_a_shift_is_part_of_the_step_of_its_weight():
  case = make('chain')
  bank = case.quantized.bank
  none = bank.replace(shifts=jax.tree.map(jnp.zeros_like, bank.shifts))
  without = case._replace(quantized=case.quantized.with_bank(none))
  tables = [estimate(c, 'first_order') for c in (case, without)]
  differ = np.any(tables[0] != tables[1], axis=1)
  assert differ.tolist() == [q.is_weight for q in case.quantized.quantizers]


@pytest.mark.parametrize('method', sensitivity.METHODS)
def test_no_images_are_refused(method):
  case = make('twice')
  none = case._replace(images=case.images[:0], labels=case.labels[:0])
  with pytest.raises(InputError, match='at least one example'):
    estimate(none, method)
