"""The bank: codes on their grids, never worse than rounding, used as stored."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_jax import quantize
from nemo_jax.core.types import InputError
from nemo_jax.quantization.numerics import bank, fake_quant, widths
from nemo_jax.quantization.ptq import equalize, layers, reconstruct, rounding
from tests.quantization.networks import filled, quick_quantize


class Network(nn.Module):
  """A product of every kind, then one whose weight is used twice."""

  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Conv(16, (3, 3), strides=2)(x))
    x = nn.relu(nn.Conv(16, (3, 3), feature_group_count=16)(x))
    x = nn.relu(nn.Conv(24, (1, 1))(x))
    x = nn.relu(nn.Conv(24, (3, 3), feature_group_count=4)(x))
    x = nn.relu(nn.Conv(24, (3, 3), kernel_dilation=2, padding='VALID')(x))
    x = x.mean(axis=(1, 2))
    twice = nn.Dense(24)
    x = nn.relu(twice(nn.relu(twice(x))))
    return nn.Dense(7)(x)


def draw(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture(scope='module')
def network():
  """(quantized, variables, images); images are correlated, as real ones are."""
  images = draw(0, 24, 16, 16, 3)
  images = images + np.roll(images, 1, 1) + np.roll(images, 1, 2) + 0.5
  model = Network()
  variables = model.init(jax.random.key(0), images[:1])
  quantized = quantize(
    model.apply, variables, images, calibration='least_squares'
  )
  return quantized, variables, images


@pytest.fixture(scope='module')
def banked(network):
  quantized, variables, images = network
  return reconstruct.reconstruct(
    quantized, variables, images, steps=reconstruct.STEPS, chunk=7
  )


@pytest.fixture(scope='module')
def bank_by(network):
  """From a few steps to the bank that they make, each made once."""
  return functools.cache(
    lambda *steps: reconstruct.reconstruct(*network, steps=steps).bank
  )


def names_of(quantized):
  """Names of the weights that have codes."""
  return {
    quantized.quantizers[site.quantizer].name for site in quantized.bank.codes
  }


def test_every_kind_of_product_has_codes(network, banked):
  quantized = network[0]
  assert names_of(banked) == {
    *(f'Conv_{i}/kernel' for i in range(5)),
    'Dense_1/kernel',
  }
  # That of the layer that is used twice is rounded to nearest as before.
  names = [q.name for q in quantized.quantizers if q.is_weight]
  assert set(names) - names_of(banked) == {'Dense_0/kernel'}


def test_codes_are_whole_numbers_of_their_width(banked):
  for site, codes in banked.bank.codes.items():
    assert codes.dtype == jnp.int8
    zero = np.asarray(banked.bank.ranges[site.quantizer].zero_point)
    for bits, held in zip(widths.CODED, np.asarray(codes), strict=True):
      low = -zero[bits - 2].max()
      assert held.min() >= low
      assert held.max() <= low + 2**bits - 1


def output_errors(quantized, variables, images, held):
  """{site: [K, C]}: squared error that weights alone leave in the output."""
  weights = quantized.weights(variables)
  inputs = {}

  def visit(site, value):
    inputs[site] = value
    return value, None

  quantized.map_operands(variables, images, visit)
  found = {}
  for layer in layers.find(quantized):
    site, shown = layer.weight, inputs[layer.input]
    exact = layer.multiply(shown, weights[site])
    shown = shown * held.equalizers.get(layer.input, 1)
    scale = held.ranges[site.quantizer].scale
    errors = []
    for row, codes in enumerate(held.codes[site]):
      shift = held.shifts[site][row].reshape(-1)
      whole = codes.astype(jnp.float32)
      out = layer.multiply(shown, whole * scale[row]) + shift
      gap = (out - exact).reshape(-1, exact.shape[-1])
      errors.append(np.sum(np.square(gap, dtype=np.float64), axis=0))
    found[site] = np.stack(errors)
  return found


@pytest.mark.parametrize('steps', [('rounding',), ('rounding', 'bias')])
def test_no_output_is_worse_than_with_plain_rounding(network, bank_by, steps):
  """Channel by channel, measured on the images and not by the moments."""
  plain = bank_by(*(step for step in steps if step != 'rounding'))
  before = output_errors(*network, plain)
  after = output_errors(*network, bank_by(*steps))
  for site, errors in after.items():
    assert np.all(errors <= before[site] * 1.001 + 1e-6)
  # Where there is something to make up for, much is gained.
  total = lambda errors: sum(
    np.log(e.sum(axis=1)).sum() for e in errors.values()
  )
  assert total(after) < total(before) - 5


def test_the_shift_takes_the_mean_of_the_error_away(network, bank_by):
  with_shift = output_errors(*network, bank_by('bias'))
  without = output_errors(*network, bank_by())
  for site, errors in with_shift.items():
    assert np.all(errors <= without[site] * 1.001 + 1e-6)


@pytest.mark.parametrize('width', [2, 3, 5, 8])
@pytest.mark.parametrize('max_bits', [8, None])
def test_the_network_runs_on_what_is_stored(network, banked, width, max_bits):
  """The bank's weights and shifts, put in by hand, give the same outputs."""
  quantized, variables, images = network
  count = len(quantized.quantizers)
  bits = jnp.asarray(
    [width if q.is_weight else 8 for q in quantized.quantizers]
  )
  actual = banked.apply(variables, images, bits, max_bits=max_bits)
  encoded = quantized.encode(
    variables, bits, banked.bank.replace(codes={}, shifts={})
  )
  assert len(encoded.grids) == count
  row = width - 2
  by_hand = encoded.replace(
    codes=encoded.codes
    | {s: c[row].astype(jnp.float32) for s, c in banked.bank.codes.items()},
    shifts={s: x[row] for s, x in banked.bank.shifts.items()},
  )
  np.testing.assert_allclose(
    actual, quantized.run(variables, images, by_hand), rtol=1e-5, atol=1e-5
  )


def test_wider_than_the_bank_is_as_without(network, banked):
  quantized, variables, images = network
  for width in (9, 16, 17):
    bits = jnp.full(len(quantized.quantizers), width)
    bank = banked.bank.replace(codes={}, shifts={})
    np.testing.assert_array_equal(
      banked.apply(variables, images, bits),
      quantized.apply(variables, images, bits, bank),
    )


@settings(max_examples=30)
@given(st.integers(1, 300), st.integers(1, 4), st.integers(0, 2**31 - 1))
def test_nearest_plane_is_that_of_a_plain_loop(depth, outputs, seed):
  rng = np.random.default_rng(seed)
  factor = np.triu(rng.normal(size=(depth, depth)), 1) / depth**0.5
  factor += np.eye(depth)
  weight = rng.normal(size=(depth, outputs))
  scale = np.full((1, outputs), 0.5)
  left, expected = np.zeros_like(weight), np.zeros_like(weight)
  for row in reversed(range(depth)):
    value = (weight[row] + factor[row] @ left) / 0.5
    if np.any(np.abs(value - np.floor(value) - 0.5) < 1e-3):
      return  # a tie, which float32 may see otherwise
    expected[row] = np.clip(np.round(value), -4, 3)
    left[row] = weight[row] - expected[row] * 0.5
  found = rounding.nearest_plane(
    *(jnp.asarray(x, jnp.float32) for x in (weight, factor, scale)), -4, 3
  )
  np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
  'change',
  [
    lambda images: images[:1],
    lambda images: np.zeros_like(images),
    lambda images: np.ones_like(images),
    lambda images: images * [1, 0, 0],
  ],
  ids=['one image', 'black', 'flat', 'dead channels'],
)
def test_moments_that_say_little_are_handled(network, change):
  quantized, variables, images = network
  images = np.asarray(change(images), np.float32)
  found = reconstruct.reconstruct(
    quantized, variables, images, steps=reconstruct.STEPS
  )
  for leaf in jax.tree.leaves(found.bank):
    assert np.all(np.isfinite(leaf))
  bits = jnp.full(len(quantized.quantizers), 6)
  assert np.all(np.isfinite(found.apply(variables, images, bits)))


def test_bad_input_is_named(network):
  with pytest.raises(InputError, match="step 'magic'; the choices are equal"):
    reconstruct.reconstruct(*network, steps=('magic',))
  with pytest.raises(InputError, match='at least one example'):
    reconstruct.reconstruct(*network[:2], network[2][:0])


def test_equalized_channels_leave_the_float_network_as_it_was(network, banked):
  """Factors are powers of two, so nothing is rounded otherwise."""
  quantized, variables, images = network
  assert banked.bank.equalizers
  for factor in banked.bank.equalizers.values():
    exponents = np.log2(np.asarray(factor))
    np.testing.assert_array_equal(exponents, np.round(exponents))
  bits = jnp.full(len(quantized.quantizers), 17)
  np.testing.assert_array_equal(
    jax.jit(banked.apply)(variables, images, bits),
    jax.jit(quantized.apply)(variables, images, bits),
  )


def test_only_what_one_layer_makes_for_another_is_equalized():
  """Not the images, a sum of branches, what two read, or a swish."""

  class Branches(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = nn.relu6(nn.Conv(8, (3, 3), name='a')(x))
      y = nn.relu(nn.BatchNorm(True)(nn.Conv(8, (1, 1), name='b')(x)))
      y = nn.max_pool(y, (2, 2))
      y = nn.Conv(8, (3, 3), feature_group_count=8, name='c')(y)
      z = nn.swish(y)
      y = nn.Conv(8, (1, 1), name='d')(z) + y
      y = nn.Conv(8, (1, 1), name='e')(y)
      return nn.Conv(8, (1, 1), name='f')(y), nn.Conv(8, (1, 1), name='g')(y)

  images, model = draw(0, 2, 8, 8, 3), Branches()
  variables = filled(jax.eval_shape(model.init, jax.random.key(0), images))
  quantized = quick_quantize(model.apply, variables, images)
  found = layers.find(quantized)
  free = equalize.free_layers(quantized, found)
  name = lambda x: quantized.quantizers[x.weight.quantizer].name
  assert [name(x) for x in found] == [f'{c}/kernel' for c in 'abcdefg']
  assert [name(x) for x in free] == ['b/kernel', 'c/kernel']


@pytest.mark.slow
def test_a_channel_apart_is_brought_in_line():
  """One channel of an activation is 64 times the others."""

  class Two(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = nn.relu(nn.Conv(8, (1, 1))(x))
      return nn.Conv(8, (3, 3), feature_group_count=8)(x)

  images, model = draw(0, 8, 8, 8, 3), Two()
  variables = model.init(jax.random.key(0), images)
  kernel = variables['params']['Conv_0']['kernel']
  variables['params']['Conv_0']['kernel'] = kernel.at[..., 0].mul(64)
  quantized = quantize(model.apply, variables, images)
  exact = model.apply(variables, images)[..., 1:]
  bits = jnp.asarray([8 if q.is_weight else 4 for q in quantized.quantizers])
  bits = bits.at[0].set(16)  # the images
  errors = [
    np.square(
      reconstruct.reconstruct(quantized, variables, images, steps=steps).apply(
        variables, images, bits
      )[..., 1:]
      - exact
    ).mean()
    for steps in ((), ('equalization',))
  ]
  assert errors[1] < errors[0] / 100


@pytest.mark.slow
def test_ranges_by_the_output_leave_less_error_in_it(network):
  """At 3 bits, of every activation in turn."""
  quantized, variables, images = network
  by_output = reconstruct.reconstruct(
    quantized, variables, images, steps=('activations',)
  )
  by_tensor = reconstruct.reconstruct(quantized, variables, images, steps=())
  gains, inputs = [], {}
  quantized.map_operands(
    variables,
    images,
    lambda site, value: (inputs.setdefault(site, value), None),
  )
  weights = quantized.weights(variables)
  for layer in layers.find(quantized):
    value, weight = inputs[layer.input], weights[layer.weight]
    errors = []
    for one in (by_tensor, by_output):
      scale, zero = one.bank.ranges[layer.input.quantizer].at(3)
      gap = fake_quant.fake_quant(value, scale, zero, 3) - value
      errors.append(float(jnp.sum(layer.multiply(gap, weight) ** 2)))
    gains.append(errors[1] / errors[0])
  assert max(gains) < 1.01
  assert min(gains) < 0.99


def test_a_bank_is_read_as_it_was_written(banked, tmp_path):
  path = tmp_path / 'banks' / 'one.npz'
  bank.save(path, banked.bank)
  read = bank.load(path)
  jax.tree.map(np.testing.assert_array_equal, read, banked.bank)
  assert [p.name for p in path.parent.iterdir()] == ['one.npz']
  path.write_bytes(path.read_bytes()[:-100])
  with pytest.raises(InputError, match='one.npz is damaged'):
    bank.load(path)
