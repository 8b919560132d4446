"""Random small functions, and what a reader of their steps expects of them.

A function is a list of steps on values [B, 4, 4]. One interpreter runs it in
JAX; another, in plain Python, tells what is multiplied and what is stored.
"""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nemo_jax
from nemo_jax import InputError
from nemo_jax.quantization import costs, transform

SIZE = 4  # of both axes of every value, and so of every weight
DRAW = np.random.default_rng(0)
MATRICES, VECTORS = 3, 2
VARIABLES = {
  **{
    f'm{i}': jnp.asarray(DRAW.normal(size=(SIZE, SIZE)), jnp.float32)
    for i in range(MATRICES)
  },
  **{
    f'v{i}': jnp.asarray(DRAW.normal(size=SIZE), jnp.float32)
    for i in range(VECTORS)
  },
}
CAPTURED_MATRIX = jnp.asarray(DRAW.normal(size=(SIZE, SIZE)), jnp.float32)
CAPTURED_VECTOR = jnp.asarray(DRAW.normal(size=SIZE), jnp.float32)
IMAGES = jnp.asarray(DRAW.normal(size=(5, SIZE, SIZE)), jnp.float32)


def array(variables, name):
  captured = {'cm': CAPTURED_MATRIX, 'cv': CAPTURED_VECTOR}
  return captured[name] if name in captured else variables[name]


# (values, array) -> a value. The reader knows of each kind by its name alone.
STEPS = {
  'dense': lambda x, y, w: x @ w,
  'dense_transposed': lambda x, y, w: x @ w.T,
  'attend': lambda x, y, w: jnp.einsum('btd,bsd->bts', x, y),
  'outer': lambda x, y, w: jnp.einsum('btd,bt->btd', x, y[..., 0]),
  'scale': lambda x, y, w: jnp.einsum('btd,d->btd', x, w[0]),
  'look_up': lambda x, y, w: x + w[jnp.argmax(y, axis=-1)],
  'resample': lambda x, y, w: x @ jnp.tril(jnp.ones((SIZE, SIZE)) / SIZE),
  'transpose': lambda x, y, w: x.transpose(0, 2, 1),
  'flip': lambda x, y, w: x[:, ::-1],
  'tanh': lambda x, y, w: jnp.tanh(x),
  'shift': lambda x, y, w: x + w,
  'mean': lambda x, y, w: x - x.mean(axis=1, keepdims=True),
}
MATRIX = ('dense', 'dense_transposed', 'scale', 'look_up')
BINARY = ('attend', 'outer', 'look_up')
VIEWS = ('transpose', 'flip')


@dataclasses.dataclass(frozen=True)
class Step:
  """One value made of earlier ones."""

  kind: str
  one: int
  two: int
  array: str

  @property
  def reads(self):
    return (self.one, self.two) if self.kind in BINARY else (self.one,)


@st.composite
def functions(draw):
  """Steps, and which values come back."""
  kinds = draw(st.lists(st.sampled_from(list(STEPS)), min_size=1, max_size=8))
  steps = []
  for i, kind in enumerate(kinds):
    value = st.integers(max(0, i - 2), i)
    names = [f'm{j}' for j in range(MATRICES)] + ['cm']
    if kind == 'shift':
      names = [f'v{j}' for j in range(VECTORS)] + ['cv']
    name = st.sampled_from(names)
    steps.append(Step(kind, draw(value), draw(value), draw(name)))
  outputs = st.lists(
    st.integers(1, len(steps)), min_size=1, max_size=2, unique=True
  )
  return tuple(steps), tuple(draw(outputs))


def run(steps, outputs):
  def apply(variables, images):
    values = [images]
    for step in steps:
      x, y, w = values[step.one], values[step.two], array(variables, step.array)
      values.append(STEPS[step.kind](x, y, w))
    return [values[i] for i in outputs]

  return apply


def live(steps, outputs):
  wanted = set(outputs)
  for i, step in reversed(list(enumerate(steps, 1))):
    wanted |= set(step.reads) if i in wanted else set()
  return [(i, step) for i, step in enumerate(steps, 1) if i in wanted]


def read(steps, outputs):
  """(is_weight, elements, scales) of each quantizer; numbers kept in float."""
  tensor, found, layouts, kept = {0: 0}, [], {}, {}
  steps = live(steps, outputs)

  def quantizer(key):
    if key not in found:
      found.append(key)

  for i, step in steps:
    tensor[i] = tensor[step.one] if step.kind in VIEWS else i
    if step.kind in ('dense', 'dense_transposed'):
      quantizer(tensor[step.one])
      quantizer(step.array)
      layouts.setdefault(step.array, set()).add(step.kind == 'dense')
    if step.kind == 'attend':
      quantizer(tensor[step.one])
      quantizer(tensor[step.two])
  for _, step in steps:
    if step.kind in ('look_up', 'scale', 'shift') and step.array in layouts:
      layouts[step.array].add(True)
    elif step.kind in ('look_up', 'shift'):
      kept[step.array] = SIZE * SIZE if step.kind == 'look_up' else SIZE
    elif step.kind == 'scale':
      kept.setdefault(step.array, SIZE)  # its first row alone
  scales = lambda key: SIZE if len(layouts[key]) == 1 else 1
  weights = [isinstance(key, str) for key in found]
  rows = [
    (True, SIZE * SIZE, scales(key)) if weight else (False, SIZE * SIZE, 2)
    for key, weight in zip(found, weights, strict=True)
  ]
  return rows, kept


@hypothesis.settings(max_examples=150)
@hypothesis.given(functions())
def test_quantizers_and_sizes_are_those_of_a_reader(function):
  apply, (rows, kept) = run(*function), read(*function)
  if not rows:
    with pytest.raises(InputError, match='nothing to quantize'):
      transform.inspect(apply, VARIABLES, IMAGES)
    return
  found = transform.inspect(apply, VARIABLES, IMAGES)
  assert [(q.is_weight, q.elements) for q in found.quantizers] == [
    row[:2] for row in rows
  ]
  bits = np.arange(len(rows)) % 7 + 2
  stored = sum(b * n for b, (w, n, _) in zip(bits, rows, strict=True) if w)
  constants = sum(count for _, _, count in rows)
  by_hand = int(stored) + 32 * (constants + sum(kept.values()))
  assert costs.model_size(found.costs, bits) == by_hand
  steps = live(*function)
  reads = {s.array for _, s in steps if s.kind in (*MATRIX, 'shift')}
  assert set(found.unread) == set(VARIABLES) - reads
  fixed = [step for _, step in steps if step.kind == 'resample']
  assert len(found.fixed) == len(fixed)


@hypothesis.settings(max_examples=12)
@hypothesis.given(functions())
def test_over_16_bits_it_is_the_function(function):
  apply = run(*function)
  hypothesis.assume(read(*function)[0])
  quantized = nemo_jax.quantize(apply, VARIABLES, IMAGES, calibration='min_max')
  count = len(quantized.quantizers)
  for images in (IMAGES, IMAGES[:1]):
    expected = apply(VARIABLES, images)
    found = quantized.apply(VARIABLES, images, np.full(count, 32))
    for a, b in zip(found, expected, strict=True):
      np.testing.assert_array_equal(a, b)
  # One by one as all together, at few bits too.
  bits = np.full(count, 3)
  together = quantized.apply(VARIABLES, IMAGES, bits)
  alone = [quantized.apply(VARIABLES, IMAGES[i : i + 1], bits) for i in (0, 4)]
  for a, b, c in zip(together, *alone, strict=True):
    both = jnp.concatenate([b, c])
    np.testing.assert_allclose(
      a[np.asarray([0, 4])], both, rtol=1e-4, atol=1e-4
    )
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(together))
