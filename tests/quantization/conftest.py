"""Networks that several test files quantize: (apply, variables, images, it)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nemo_jax
from nemo_jax.quantization.numerics import ranges as ranges_lib
from nemo_jax.quantization.numerics import widths as widths_lib
from tests.quantization.networks import (
  LinenNet,
  NnxNet,
  attention_net,
  filled,
  normal,
  on_grid,
  quick_quantize,
  residual_net,
)


@pytest.fixture(scope='session')
def linen():
  """(apply, variables, images, quantized)."""
  model, images = LinenNet(), normal(0, 6, 8, 8, 3)
  variables = filled(jax.eval_shape(model.init, jax.random.key(0), images))
  return (
    model.apply,
    variables,
    images,
    quick_quantize(model.apply, variables, images),
  )


@pytest.fixture(scope='session')
def merged():
  """(apply, variables, images, quantized)."""
  graphdef, shapes = nnx.split(nnx.eval_shape(lambda: NnxNet(nnx.Rngs(0))))
  images = normal(0, 6, 6, 6, 3)

  def apply(state, images):
    return nnx.merge(graphdef, state)(images)

  state = filled(shapes)
  return apply, state, images, quick_quantize(apply, state, images)


@pytest.fixture(scope='session')
def attention():
  """(apply, variables, images, quantized)."""
  variables = {
    'embed': normal(1, 6, 4),
    'query': normal(2, 4, 3),
    'key': normal(3, 4, 3),
  }
  images = normal(0, 5, 7, 6)
  return (
    attention_net,
    variables,
    images,
    quick_quantize(attention_net, variables, images),
  )


@pytest.fixture(scope='session')
def residual():
  """(apply, variables, images, quantized)."""
  shapes = {
    'stem': (3, 3, 3, 4),
    'depthwise': (3, 3, 1, 4),
    'project': (1, 1, 4, 4),
    'head': (4, 5),
  }
  variables = {
    name: {
      'w': normal(i, *shape, scale=0.4),
      'b': on_grid(normal(i + 10, shape[-1], scale=0.2), 8),
    }
    for i, (name, shape) in enumerate(shapes.items())
  }
  images = on_grid(normal(0, 6, 7, 7, 3, scale=0.7), 6)
  quantized = nemo_jax.quantize(residual_net, variables, images)
  return residual_net, variables, images, quantized


@pytest.fixture(scope='session')
def exact_ranges(residual):
  """Ranges with powers of two for scales, whose arithmetic float32 has exactly.

  The steps of activations are 2^(2-b), those of weights 2^(1-b) or half of it,
  by channel.
  """
  widths = 2.0 ** np.asarray(widths_lib.WIDTHS, np.float32)
  ranges, quantized = [], residual[-1]
  for quantizer, table in zip(
    quantized.quantizers, quantized.bank.ranges, strict=True
  ):
    column = widths.reshape(-1, *[1] * (table.scale.ndim - 1))
    if quantizer.is_weight:
      halves = 2.0 ** -(np.arange(table.scale.shape[-1]) % 2)
      scale, zero_point = 2 / column * halves, column / 2
    else:
      signed = quantizer.name in ('stem:input', 'head:input')
      scale, zero_point = 4 / column, column / 4 * signed
    zero_point = np.broadcast_to(zero_point, scale.shape)
    ranges.append(
      ranges_lib.Range(
        jnp.asarray(scale, jnp.float32), jnp.asarray(zero_point, jnp.float32)
      )
    )
  return tuple(ranges)
