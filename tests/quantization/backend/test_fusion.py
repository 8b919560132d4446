"""What is computed in one kernel, and that it is what XLA computes."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemo_jax import quantize
from nemo_jax.models import resnet
from nemo_jax.quantization.backend import fusion, kernels, units
from nemo_jax.quantization.trace import program


def convolve(images, kernel, strides=(1, 1)):
  """Of codes: bfloat16 in, float32 out."""
  edges = tuple((size // 2,) * 2 for size in kernel.shape[:2])
  return jax.lax.conv_general_dilated(
    images,
    kernel,
    strides,
    edges,
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    preferred_element_type=jnp.float32,
  )


def codes(seed, *shape):
  found = np.random.default_rng(seed).integers(-8, 9, shape)
  return jnp.asarray(found, jnp.bfloat16)


IMAGES, KERNEL = codes(0, 2, 4, 4, 32), codes(1, 1, 1, 32, 32)


def flat(apply, *arguments):
  closed = jax.make_jaxpr(apply)(*arguments)
  return program.without_repeats(program.flatten(closed, derivatives=False))


def groups(apply, *arguments):
  """Names of the tails of kernels, and the dtypes that they write."""
  whole = flat(apply, *arguments)
  found = [x for x in fusion.plan(whole) if isinstance(x, fusion.Group)]
  return [
    (
      len(group.convolutions),
      [equation.name for equation in group.tail],
      [whole.avals[slot].dtype.name for slot in group.outputs],
    )
    for group in found
  ]


def assert_same(apply, *arguments):
  out = jax.jit(fusion.by_kernels(apply, interpret=True))(*arguments)
  expected = jax.jit(apply)(*arguments)
  # NumPy does not take NaNs of bfloat16 for the same.
  out, expected = jax.tree.map(np.float32, (out, expected))
  jax.tree.map(np.testing.assert_array_equal, out, expected)


def test_what_follows_number_by_number_is_in_the_kernel():
  def apply(images, kernel, scale):
    y = jax.nn.relu(convolve(images, kernel) * scale)
    return jnp.clip(jnp.round(y), 0, 7).astype(jnp.bfloat16)

  arguments = IMAGES, KERNEL, jnp.full(32, 0.25)
  ((count, tail, dtypes),) = groups(apply, *arguments)
  assert (count, dtypes) == (1, ['bfloat16'])
  assert tail == ['mul', 'max', 'round', 'max', 'min', 'convert_element_type']
  assert_same(apply, *arguments)


def test_sums_are_written_when_others_read_them():
  def apply(images, kernel):
    y = convolve(images, kernel)
    return y.mean(axis=(1, 2)), y + 1

  assert groups(apply, IMAGES, KERNEL) == [(1, ['add'], ['float32'] * 2)]
  assert_same(apply, IMAGES, KERNEL)


def test_a_shortcut_is_read_and_its_convolution_joins():
  def apply(images, kernel):
    x = convolve(images, kernel)
    y = convolve(jnp.round(x / 64).astype(jnp.bfloat16), kernel)
    return y + convolve(images, kernel[:, :, ::-1]), y * x

  found = groups(apply, IMAGES, KERNEL)
  assert [count for count, *_ in found] == [1, 2]
  assert found[1][1:] == (['add', 'mul'], ['float32'] * 2)
  assert_same(apply, IMAGES, KERNEL)


def test_kernels_that_wait_for_each_other_stay_apart():
  def apply(images, kernel):
    x = convolve(images, kernel)
    least = x.min(axis=-1, keepdims=True)  # not number by number
    y = convolve(jnp.broadcast_to(least, x.shape).astype(jnp.bfloat16), kernel)
    # Reads what waits for x: no part of its kernel.
    return x + y, x - least * jnp.ones_like(x)

  found = groups(apply, IMAGES, KERNEL)
  assert [count for count, *_ in found] == [1, 1]
  assert found[0][1] == []
  assert_same(apply, IMAGES, KERNEL)


def test_no_kernel_has_more_than_two_convolutions():
  def apply(images, kernel):
    parts = [convolve(images, kernel + i) for i in range(4)]
    return sum(parts[1:], start=parts[0])

  counts = [count for count, *_ in groups(apply, IMAGES, KERNEL)]
  assert sorted(counts) == [1, 1, 2]
  assert_same(apply, IMAGES, KERNEL)


def test_quotients_and_exponentials_are_left_to_xla():
  def apply(images, kernel):
    return jnp.exp(convolve(images, kernel) * 0.01) / 3 + 1

  assert groups(apply, IMAGES, KERNEL) == [(1, ['mul'], ['float32'])]


def test_rounding_away_from_zero_is_kept():
  apply = lambda x, k: jax.lax.round(convolve(x, k) * 0.5)
  assert groups(apply, IMAGES, KERNEL) == [(1, ['mul'], ['float32'])]
  assert_same(apply, IMAGES, KERNEL)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16, jnp.float16])
def test_every_step_has_a_form_in_kernels_that_keeps_nan(dtype):
  def apply(images, kernel, numbers):
    x = convolve(images, kernel).astype(dtype)
    y = jnp.round(jnp.abs(-x) - 1) + numbers
    y = jax.lax.clamp(numbers[0], y, numbers[0] + 6)
    return jnp.minimum(jax.nn.relu(y), 9) * numbers

  arguments = IMAGES, KERNEL, codes(2, 32).astype(dtype)
  ((_, tail, _),) = groups(apply, *arguments)
  others = {'add_any', 'convert_element_type'}
  assert set(units.ELEMENTWISE) - set(tail) <= others
  assert_same(apply, *arguments)
  assert_same(apply, IMAGES.at[0, 0, 0, 0].set(jnp.nan), *arguments[1:])
  fused = jax.jit(fusion.by_kernels(apply)).trace(*arguments)
  assert 'gpu.triton' in fused.lower(lowering_platforms=('cuda',)).as_text()


def test_what_nobody_reads_is_not_computed():
  def apply(images, kernel):
    convolve(images, kernel)
    return images.sum()

  assert_same(apply, IMAGES, KERNEL)


@pytest.mark.parametrize('depth', [24, 32])
def test_other_products_run_as_before(depth):
  def apply(images, kernel, wide):
    y = convolve(images[..., :depth], kernel[:, :, :depth])
    z = convolve(images.astype(jnp.float32), kernel.astype(jnp.float32))
    return y.mean(axis=(1, 2)).astype(jnp.bfloat16) @ wide, z

  wide = codes(2, 32, 8)
  assert len(groups(apply, IMAGES, KERNEL, wide)) == (depth == 32)
  assert_same(apply, IMAGES, KERNEL, wide)


def test_without_repeats_nothing_is_computed_twice():
  def apply(x):
    return jnp.sin(x) * 2 + jnp.sin(x) * 2, jnp.cos(x) * 2.5

  x = jnp.arange(3.0)
  whole = flat(apply, x)
  names = [equation.name for equation in whole.equations]
  assert sorted(names) == ['add', 'cos', 'mul', 'mul', 'sin']
  for one, other in zip(program.run(whole, [x]), apply(x), strict=True):
    np.testing.assert_array_equal(one, other)


def test_zeros_of_both_signs_are_two_constants():
  apply = lambda x: (1 / (x * 0.0), 1 / (x * -0.0))
  whole = flat(apply, jnp.ones(3))
  for one, other in zip(
    program.run(whole, [jnp.ones(3)]), apply(jnp.ones(3)), strict=True
  ):
    np.testing.assert_array_equal(one, other)


def test_effects_are_kept_apart():
  calls = []

  def apply(images, kernel):
    jax.debug.callback(lambda: calls.append(1))
    jax.debug.callback(lambda: calls.append(1))
    return convolve(images, kernel)

  jax.block_until_ready(
    fusion.by_kernels(apply, interpret=True)(IMAGES, KERNEL)
  )
  jax.effects_barrier()
  assert len(calls) == 2


@pytest.mark.parametrize('available', [False, True])
def test_gradients_reach_what_a_function_captured(monkeypatch, available):
  monkeypatch.setattr(kernels, 'available', lambda: available)
  images, kernel = jnp.ones((1, 4, 4, 32)), jnp.ones((1, 1, 32, 32))

  def loss(bias):
    apply = lambda kernel, images: convolve(images, kernel) + bias
    quantized = quantize(apply, kernel, images, lowering='backend')
    bits = np.full(len(quantized.quantizers), 8)
    return quantized.apply(kernel, images, bits, max_bits=8).sum()

  found = jax.grad(loss)(jnp.ones(32))
  np.testing.assert_array_equal(found, np.full(32, 16.0))


class Net(nn.Module):
  """A first layer of few channels, two blocks, one with a projection."""

  @nn.compact
  def __call__(self, x):
    x = nn.relu(resnet.conv(32, 7, 'stem', stride=2)(x))
    x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
    for name, stride in (('one', 2), ('two', 1)):
      x = resnet._bottleneck(x, 32, stride, 1, 64, name)
    return nn.Dense(8)(jnp.mean(x, axis=(1, 2)))


@functools.cache
def network(**options):
  images = np.random.default_rng(0).normal(size=(3, 32, 32, 3))
  images = images.astype(np.float32)
  variables = Net().init(jax.random.key(0), images)
  quantized = quantize(
    Net().apply, variables, images, lowering='backend', **options
  )
  return quantized, variables, images


def candidate(quantized, variables, images, bits, max_bits=8):
  encoded = quantized.encode(variables, bits, max_bits=max_bits)
  return quantized.run(variables, images, encoded)


def test_a_network_is_known_as_kernels(monkeypatch):
  quantized, variables, images = network()
  bits = np.full(len(quantized.quantizers), 8)
  monkeypatch.setattr(kernels, 'available', lambda: True)
  run = jax.jit(functools.partial(candidate, quantized))
  traced = run.trace(variables, images, bits)
  text = traced.lower(lowering_platforms=('cuda',)).as_text()
  # The projection shares the kernel of the convolution that it is added to.
  assert text.count('custom_call @__gpu$xla.gpu.triton') == 7
  assert 'stablehlo.convolution' not in text
  # None on other platforms, nor beyond the widths that bfloat16 holds.
  assert 'gpu.triton' not in traced.lower(lowering_platforms=('cpu',)).as_text()
  wide = jax.jit(functools.partial(candidate, quantized, max_bits=9))
  wide = wide.trace(variables, images, bits)
  text = wide.lower(lowering_platforms=('cuda',)).as_text()
  assert 'gpu.triton' not in text


def test_gradients_are_those_without_kernels(monkeypatch):
  quantized, variables, images = network()
  bits = np.full(len(quantized.quantizers), 8)
  total = lambda *x: jnp.sum(jnp.sin(candidate(quantized, *x)))
  gradients = lambda: jax.jit(jax.grad(total))(variables, images, bits)
  expected = gradients()
  monkeypatch.setattr(kernels, 'available', lambda: True)
  total = lambda *x: jnp.sum(jnp.sin(candidate(quantized, *x)))
  jax.tree.map(np.testing.assert_array_equal, gradients(), expected)


@pytest.mark.parametrize(
  'options',
  [{}, {'extra_ops': ('add',)}, {'weight_scheme': 'asymmetric'}],
  ids=str,
)
def test_a_network_is_the_same_at_every_width(monkeypatch, options):
  quantized, variables, images = network(**options)
  count = len(quantized.quantizers)
  draw = np.random.default_rng(1)
  rows = [np.full(count, width) for width in range(2, 9)]
  rows = np.int32([*rows, *draw.integers(2, 9, (3, count))])
  run = functools.partial(candidate, quantized)
  expected = jax.jit(jax.vmap(run, (None, None, 0)))(variables, images, rows)
  interpreted = lambda of_codes, _: fusion.by_kernels(of_codes, interpret=True)
  monkeypatch.setattr(fusion, 'on_gpu', interpreted)
  run = functools.partial(candidate, quantized)
  one = jax.jit(run)
  found = np.stack([one(variables, images, row) for row in rows])
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
  if not options:
    many = jax.jit(jax.vmap(run, (None, None, 0)))(variables, images, rows)
    np.testing.assert_allclose(many, expected, rtol=1e-5, atol=1e-5)
