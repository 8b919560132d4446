"""Small networks to quantize, and what is asked of them."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import nemo_jax

NHWC = ('NHWC', 'HWIO', 'NHWC')
# Structure does not depend on the ranges; these are the quickest to find.
quick_quantize = functools.partial(nemo_jax.quantize, calibration='min_max')


def normal(seed, *shape, scale=1.0):
  draw = np.random.default_rng(seed).normal(size=shape) * scale
  return jnp.asarray(draw, jnp.float32)


def filled(shapes):
  """Variables of the shapes, in which norms and biases do something too."""

  def fill(i, x):
    if jnp.issubdtype(x.dtype, jnp.floating):
      values = normal(i, *x.shape, scale=0.4)
      return jnp.abs(values) + 0.2 if x.ndim == 1 else values
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return jax.random.key(0) if is_key else jnp.zeros(x.shape, x.dtype)

  leaves, treedef = jax.tree.flatten(shapes)
  return jax.tree.unflatten(treedef, [fill(i, x) for i, x in enumerate(leaves)])


def conv(x, kernel, stride=1, groups=1, padding='SAME'):
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    padding,
    dimension_numbers=NHWC,
    feature_group_count=groups,
  )


# What is asked of a quantized network.


def names(quantized):
  return [q.name for q in quantized.quantizers]


def operands(quantized):
  """What each operation consumes: its name, and those of its quantizers."""
  known = names(quantized)
  return [
    (op.name, [known[i] for i in op.operands]) for op in quantized.operations
  ]


def edges(graph):
  return list(
    zip(graph.senders.tolist(), graph.receivers.tolist(), strict=True)
  )


def uniform(quantized, bits):
  return jnp.full(len(quantized.quantizers), bits, jnp.int32)


def assert_float_beyond_16_bits(quantized, apply, variables, images):
  expected = jax.jit(apply)(variables, images)
  run = jax.jit(quantized.apply)
  for bits in (17, 32):
    actual = run(variables, images, uniform(quantized, bits))
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    leaves = jax.tree.leaves(actual), jax.tree.leaves(expected)
    for a, b in zip(*leaves, strict=True):
      assert a.dtype == b.dtype
      np.testing.assert_allclose(a, b, 1e-6, 1e-6 * np.abs(b).max())


# One matrix product.


ROWS, STACK = normal(0, 5, 4), {'w': normal(1, 3, 4, 4)}
IMAGES, WEIGHT = normal(0, 6, 5, 4), {'w': normal(1, 4, 3)}
WORDS = jnp.asarray(np.random.default_rng(1).integers(0, 10, (6, 5)))


def dense(v, x):
  return x @ v['w'][0]


# Networks of several layers.


class LinenNet(nn.Module):
  """One of each kind of layer."""

  @nn.compact
  def __call__(self, x):
    """Logits [B, 5] of images [B, 8, 8, 3]."""
    norm = functools.partial(nn.BatchNorm, use_running_average=True)
    x = nn.Conv(8, (3, 3), strides=2, use_bias=False, name='stem')(x)
    x = nn.swish(norm()(x))
    y = nn.Conv(8, (3, 3), feature_group_count=8, name='depthwise')(x)
    y = nn.gelu(norm()(y))
    y = nn.remat(nn.Conv)(8, (1, 1), name='project')(y)
    x = nn.relu(x + y)
    x = nn.max_pool(x, (2, 2), strides=(2, 2))
    x = nn.Conv(6, (2, 2), feature_group_count=2, name='grouped')(x)
    x = nn.avg_pool(nn.relu(x), (2, 2))
    return nn.Dense(5, name='head')(x.reshape(len(x), -1))


class NnxNet(nnx.Module):
  """A convolution, a norm, a list of layers, and dropout at rest."""

  def __init__(self, rngs):
    self.conv1 = nnx.Conv(3, 4, (3, 3), rngs=rngs)
    self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, deterministic=True, rngs=rngs)
    self.blocks = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])
    self.head = nnx.Linear(4, 5, rngs=rngs)

  def __call__(self, x):
    """Logits [B, 5] of images [B, 6, 6, 3]."""
    x = nnx.relu(self.norm(self.conv1(x)))
    x = self.dropout(jnp.mean(x, (1, 2)))
    for block in self.blocks:
      x = nnx.relu(block(x))
    return self.head(x)


def attention_net(v, x):
  """Self-attention between an embedding and its transpose; x [B, T, 6]."""
  h = jnp.einsum('btc,cd->btd', x, v['embed'])
  q = jnp.einsum('btd,de->bte', h, v['query'])
  k = jnp.einsum('btd,de->bte', h, v['key'])
  scores = jnp.einsum('bqe,bke->bqk', q, k) / 2
  h = jnp.einsum('bqk,bkd->bqd', jax.nn.softmax(scores), h)
  return h @ v['embed'].T


def residual_net(v, x):
  """Logits [B, 5] of images [B, 7, 7, 3]."""
  x = jax.nn.relu(conv(x, v['stem']['w'], stride=2) + v['stem']['b'])
  y = conv(x, v['depthwise']['w'], groups=4) + v['depthwise']['b']
  y = conv(jax.nn.relu(y), v['project']['w']) + v['project']['b']
  x = jnp.mean(jax.nn.relu(x + y), (1, 2))
  return x @ v['head']['w'] + v['head']['b']


def on_grid(x, bits):
  """The nearest multiples of 2^-bits."""
  return jnp.round(x * 2**bits) / 2**bits


# Bits for the 8 quantizers of `residual_net`.
WIDTHS_TRIED = [*([b] * 8 for b in (2, 3, 4, 8)), [8, 2, 3, 7, 5, 4, 6, 2]]
