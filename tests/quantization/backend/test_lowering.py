"""Rewritten convolutions against those of XLA, and where they apply."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_jax import quantize
from nemo_jax.quantization.backend import lowering
from nemo_jax.quantization.trace import program

LAYOUT = ('NHWC', 'HWIO', 'NHWC')


def convolve(images, kernel, groups, strides=(1, 1), padding='VALID', **kw):
  return jax.lax.conv_general_dilated(
    images,
    kernel,
    strides,
    padding,
    dimension_numbers=kw.pop('layout', LAYOUT),
    feature_group_count=groups,
    **kw,
  )


def rewrite(equation, operands):
  return [lowering.for_backend(equation, operands)]


def lowered(apply, *arguments):
  """What the rewritten program computes, and its compiled text."""

  def run(*arguments):
    flat = program.flatten(jax.make_jaxpr(apply)(*arguments))
    (out,) = program.run(flat, arguments, rewrite)
    return out

  compiled = jax.jit(run).lower(*arguments).compile()
  return compiled(*arguments), compiled.as_text()


def values(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@settings(max_examples=25)
@given(
  st.integers(1, 3),
  st.integers(1, 3),
  st.tuples(st.integers(1, 3), st.integers(1, 3)),
  st.tuples(*[st.tuples(st.integers(0, 2), st.integers(0, 2))] * 2),
  st.sampled_from(['depthwise', 'pointwise', 'grouped', 'shallow']),
)
def test_rewritten_convolutions_are_the_same(
  height, width, strides, padding, kind
):
  images = values(0, 2, 7, 6, 3 if kind == 'shallow' else 4)
  shape, groups = {
    'depthwise': ((height, width, 1, 4), 4),
    'pointwise': ((1, 1, 4, 5), 1),
    'grouped': ((height, width, 2, 6), 2),
    'shallow': ((height, width, 3, 5), 1),
  }[kind]
  kernel = values(1, *shape)
  apply = lambda x, k: convolve(x, k, groups, strides, padding)
  out, text = lowered(apply, images, kernel)
  expected = apply(images, kernel)
  assert out.shape == expected.shape
  np.testing.assert_allclose(out, expected, atol=1e-5)
  if kind == 'grouped':
    assert 'feature_group_count' not in text
  else:
    assert ' convolution(' not in text


@settings(max_examples=10)
@given(
  st.tuples(st.integers(1, 5), st.integers(1, 5)),
  st.tuples(st.integers(1, 3), st.integers(1, 3)),
  st.tuples(*[st.tuples(st.integers(0, 3), st.integers(0, 3))] * 2),
)
def test_strides_may_become_channels(window, strides, padding):
  images, kernel = values(0, 2, 7, 6, 3), values(1, *window, 3, 4)
  deep = jax.jit(lowering.space_to_depth, static_argnums=(2, 3))
  out = deep(images, kernel, strides, padding)
  expected = convolve(images, kernel, 1, strides, padding)
  np.testing.assert_allclose(out, expected, atol=1e-4)


@pytest.mark.parametrize(
  ('kernel', 'options'),
  [
    ((3, 3, 4, 5), {'groups': 1}),
    ((3, 3, 1, 4), {'groups': 4, 'rhs_dilation': (2, 2)}),
    (
      (3, 3, 1, 4),
      {
        'groups': 4,
        'lhs_dilation': (2, 2),
        'padding': ((0, 0), (0, 0)),
      },
    ),
    ((1, 1, 4, 5), {'groups': 1, 'padding': ((-1, 0), (0, 0))}),
  ],
)
def test_other_convolutions_stay_as_traced(kernel, options):
  images, kernel = values(0, 2, 8, 8, 4), values(1, *kernel)
  apply = lambda x, k: convolve(x, k, **options)
  out, _ = lowered(apply, images, kernel)
  np.testing.assert_array_equal(out, jax.jit(apply)(images, kernel))


def test_many_groups_stay_as_traced():
  images, kernel = values(0, 1, 4, 4, 130), values(1, 3, 3, 2, 130)
  apply = functools.partial(convolve, groups=65)
  _, text = lowered(apply, images, kernel)
  assert 'feature_group_count=65' in text


def test_other_layouts_stay_as_traced():
  images, kernel = values(0, 2, 4, 8, 8), values(1, 5, 4, 1, 1)
  layout = ('NCHW', 'OIHW', 'NCHW')
  apply = lambda x, k: convolve(x, k, 1, layout=layout)
  out, _ = lowered(apply, images, kernel)
  np.testing.assert_array_equal(out, jax.jit(apply)(images, kernel))


def test_gradients_and_vmap_go_through():
  images, kernel = values(0, 2, 6, 6, 4), values(1, 3, 3, 1, 4)
  apply = functools.partial(convolve, groups=4)
  flat = program.flatten(jax.make_jaxpr(apply)(images, kernel))
  run = lambda x, k: program.run(flat, [x, k], rewrite)[0]
  loss = lambda f: lambda k: jnp.sum(f(images, k) ** 2)
  np.testing.assert_allclose(
    jax.grad(loss(run))(kernel), jax.grad(loss(apply))(kernel), rtol=1e-4
  )
  kernels = jnp.stack([kernel, 2 * kernel])
  both = jax.vmap(lambda k: run(images, k))(kernels)
  np.testing.assert_allclose(both[1], apply(images, 2 * kernel), atol=1e-4)


def test_other_backends_keep_a_convolution_of_any_numbers():
  images, kernel = values(0, 2, 6, 6, 4), values(1, 3, 3, 1, 4)
  apply = functools.partial(convolve, groups=4)
  flat = program.flatten(jax.make_jaxpr(apply)(images, kernel))
  run = lambda x, k: program.run(flat, [x, k], rewrite)[0]
  for platform, kept in (('cpu', False), ('cuda', True), ('tpu', True)):
    traced = jax.jit(run).trace(images, kernel)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert ('stablehlo.convolution' in text) == kept, platform
    # The default precision of matrix units would round them.
    assert ('HIGHEST' in text) == kept, platform


@pytest.mark.slow
def test_quantized_networks_agree_to_float_rounding(digits):
  networks = [
    quantize(
      digits.apply, digits.variables, digits.calibration.images, lowering=way
    )
    for way in ('traced', 'backend')
  ]
  images = digits.search.images
  for width in (17, 8):
    bits = jnp.full(20, width)
    traced, backend = (
      jax.jit(n.apply)(digits.variables, images, bits) for n in networks
    )
    # At 8 bits a rounding may tip a value to the next code.
    tolerance = 1e-4 if width > 16 else 0.2
    np.testing.assert_allclose(traced, backend, atol=tolerance)


def test_an_accelerator_runs_no_product_of_eight_bit_codes_in_float32(digits):
  quantized = quantize(
    digits.apply,
    digits.variables,
    digits.calibration.images[:32],
    calibration='min_max',
    lowering='backend',
  )
  images = digits.search.images[:4]

  @jax.jit
  def run(images, bits):
    return quantized.apply(digits.variables, images, bits, max_bits=8)

  kinds = [operation.kind for operation in quantized.operations]
  # A GPU sums depthwise products outside of its matrix units.
  counts = {'cuda': 10 - kinds.count('depthwise'), 'tpu': 10}
  for platform, count in counts.items():
    traced = run.trace(images, jnp.full(20, 8))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    words = ('stablehlo.convolution', 'stablehlo.dot_general')
    products = [
      line for line in text.splitlines() if any(word in line for word in words)
    ]
    assert len(products) == count
    for line in products:
      assert line.rsplit(' : ', 1)[1].split(' -> ')[0].count('xbf16') == 2


def test_an_unknown_lowering_lists_the_known(digits):
  with pytest.raises(ValueError, match="'fast'; the choices are traced, back"):
    quantize(
      digits.apply,
      digits.variables,
      digits.calibration.images,
      lowering='fast',
    )


PRODUCTS = {  # channels, kernel, groups
  'standard': (16, (3, 3, 16, 24), 1),
  'pointwise': (16, (1, 1, 16, 24), 1),
  'grouped': (16, (3, 3, 4, 24), 4),
  'depthwise': (16, (3, 3, 1, 16), 16),
  'shallow': (3, (3, 3, 3, 24), 1),
  'strided': (3, (5, 5, 3, 24), 1),
}
STRIDES = {'strided': (2, 2)}


def convolve_as(name):
  """The convolution of that name in PRODUCTS."""
  strides = STRIDES.get(name, (1, 1))
  return functools.partial(convolve, groups=PRODUCTS[name][2], strides=strides)


def codes(name):
  """Images and a kernel of the widest codes that 8 bits have."""
  draw = np.random.default_rng(0)
  channels, shape, _ = PRODUCTS[name]
  # Affine ones less a zero point at either end.
  images = draw.integers(-255, 256, (2, 6, 6, channels))
  kernel = draw.integers(-128, 128, shape)
  return images.astype(np.float32), kernel.astype(np.float32)


def trace_narrow(name, images, kernel):
  """The product of codes of at most 8 bits as `for_backend` runs it."""
  apply = convolve_as(name)
  flat = program.flatten(jax.make_jaxpr(apply)(images, kernel))
  narrow = functools.partial(lowering.for_backend, narrow=True)
  run = lambda x, k: program.run(
    flat, [x, k], lambda equation, operands: [narrow(equation, operands)]
  )[0]
  return jax.jit(run).trace(images, kernel)


CALLS = r'stablehlo\.(convolution|dot_general)'


@pytest.mark.parametrize('platform', ['cuda', 'tpu'])
@pytest.mark.parametrize('name', PRODUCTS)
def test_matrix_units_get_bfloat16_and_sum_in_float32(name, platform):
  traced = trace_narrow(name, *codes(name))
  text = traced.lower(lowering_platforms=(platform,)).as_text()
  lines = [x for x in text.splitlines() if re.search(CALLS, x)]
  if (name, platform) == ('depthwise', 'cuda'):
    assert not lines  # nothing for a matrix unit
    return
  (line,) = lines
  operands, result = line.rsplit(' : ', 1)[1].split(' -> ')
  assert operands.count('xbf16') == 2
  assert 'xf32' in result
  kind = 'dot' if (name, platform) == ('pointwise', 'cuda') else 'conv'
  assert f'stablehlo.{kind}' in line
  # Strides over pixels have become channels.
  is_deep = 'x12x' in operands
  assert is_deep == ((name, platform) == ('strided', 'cuda'))


@pytest.mark.parametrize('name', PRODUCTS)
def test_products_of_eight_bit_codes_are_those_of_integers(name):
  images, kernel = codes(name)
  apply = convolve_as(name)
  whole = images.astype(np.int32), kernel.astype(np.int32)
  # Not every backend has convolutions of integers.
  expected = apply(*jax.device_put(whole, jax.devices('cpu')[0]))
  operands = images, kernel
  (equation,) = program.flatten(jax.make_jaxpr(apply)(*operands)).equations
  operands = [jnp.asarray(x) for x in operands]
  found = [
    trace_narrow(name, *operands).lower().compile()(*operands),
    lowering.of_codes(equation, operands),
    lowering.of_codes_on_gpu(equation, operands),
  ]
  for out in found:
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize('name', PRODUCTS)
def test_gradients_of_narrow_products_are_those_of_any(name):
  images, kernel = codes(name)
  apply = convolve_as(name)
  (equation,) = program.flatten(jax.make_jaxpr(apply)(images, kernel)).equations
  total = lambda form: lambda *operands: jnp.sum(jnp.sin(form(*operands) / 1e4))
  narrow = lambda *x: lowering.for_backend(equation, x, narrow=True)
  gradients = lambda form: jax.jit(jax.grad(total(form), argnums=(0, 1)))
  found = gradients(narrow)(images, kernel)
  expected = gradients(apply)(images, kernel)
  for one, other in zip(found, expected, strict=True):
    assert np.any(other)
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_what_is_no_number_stays_none():
  images, kernel = codes('depthwise')
  images[0, 3, 3, 0] = np.nan
  out = trace_narrow('depthwise', images, kernel).lower().compile()
  assert np.isnan(out(images, kernel)[0, 2, 2, 0])


def test_depthwise_codes_wait_in_sixteen_bits():
  images, kernel = codes('depthwise')
  compiled = trace_narrow('depthwise', images, kernel).lower().compile()
  assert 'bf16[2,6,6,16]' in compiled.as_text()


@pytest.mark.parametrize('window', [(1, 1), (3, 3)])
@pytest.mark.parametrize('groups', [1, 32])
def test_a_network_in_bfloat16_has_every_form(window, groups):
  net = nn.Conv(32, window, dtype=jnp.bfloat16, feature_group_count=groups)
  images = values(0, 2, 4, 4, 32)
  variables = net.init(jax.random.key(0), images)
  quantized = quantize(net.apply, variables, images, lowering='backend')
  bits = np.full(len(quantized.quantizers), 8)
  out = quantized.apply(variables, images, bits)
  expected = net.apply(variables, images)
  assert out.dtype == expected.dtype == jnp.bfloat16
  off = (out - expected).astype(jnp.float32)
  assert jnp.linalg.norm(off) < 0.05 * jnp.linalg.norm(expected)
