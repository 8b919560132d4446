"""What is read from a function's traces, for one image and for more."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nemo_jax
from nemo_jax import InputError
from nemo_jax.quantization import transform
from nemo_jax.quantization.ptq.reconstruct import reconstruct
from tests.quantization.networks import IMAGES, WEIGHT, names, normal

# Dead code, and what nothing reads.


def test_a_head_that_is_dropped_is_neither_quantized_nor_counted():
  class TwoHeads(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = nn.relu(nn.Dense(8, name='body')(x))
      return nn.Dense(3, name='head')(x), nn.Dense(50, name='other')(x)

  model = TwoHeads()
  variables = model.init(jax.random.key(0), IMAGES)
  one = lambda v, x: model.apply(v, x)[0]
  structure = transform.inspect(one, variables, IMAGES)
  assert [op.name for op in structure.operations] == ['body', 'head']
  assert set(structure.unread) == {'other/kernel', 'other/bias'}
  assert structure.costs.parameters == (4 + 1) * 8 + (8 + 1) * 3
  assert structure.costs.macs.sum() == 5 * (4 * 8 + 8 * 3)
  both = transform.inspect(model.apply, variables, IMAGES)
  assert both.unread == ()
  assert len(both.operations) == 3


def dead_in_a_scan(v, x):
  carry, _ = jax.lax.scan(lambda c, w: (jnp.tanh(c), c @ w), x, v['dead'])
  return carry @ v['w']


@pytest.mark.parametrize(
  'apply',
  [
    lambda v, x: (x @ v['w'], x @ v['dead'][0])[0],
    lambda v, x: jax.jit(lambda x: (x @ v['w'], x @ v['dead'][0]))(x)[0],
    lambda v, x: (x @ v['dead'][0] @ v['dead'][1], x @ v['w'])[1],
    dead_in_a_scan,
  ],
  ids=['tuple', 'jit', 'chain', 'scan'],
)
def test_what_no_output_needs_is_not_there(apply):
  variables = WEIGHT | {'dead': normal(3, 2, 4, 4)}
  quantized = nemo_jax.quantize(apply, variables, IMAGES, calibration='min_max')
  assert names(quantized) == ['w:input', 'w']
  assert quantized.unread == ('dead',)
  assert quantized.costs.parameters == 12
  found = quantized.apply(variables, IMAGES, np.full(2, 32))
  np.testing.assert_allclose(found, apply(variables, IMAGES), rtol=1e-6)


def test_prints_inside_of_a_network_are_kept(capfd):
  def apply(v, x):
    jax.debug.print('seen')
    return x @ v['w']

  quantized = nemo_jax.quantize(apply, WEIGHT, IMAGES, calibration='min_max')
  jax.effects_barrier()
  capfd.readouterr()
  quantized.apply(WEIGHT, IMAGES, np.full(2, 32)).block_until_ready()
  jax.effects_barrier()
  assert capfd.readouterr().out.count('seen') == 1


# The number of images.


def with_class_token(v, x):
  token = jnp.broadcast_to(v['token'], (len(x), 1, 4))
  x = jnp.concatenate([token, x], axis=1)
  return jax.nn.relu(x @ v['w']).mean(1) @ v['head']


def query(repeat):
  """Attention with learned queries, repeated for every image of a batch."""

  def apply(v, x):
    queries = repeat(v['query'], len(x)) @ v['w']
    keys = x @ v['w']
    scores = jax.nn.softmax(jnp.einsum('bqd,bkd->bqk', queries, keys))
    return (scores @ keys).mean(1) @ v['head']

  return apply


TOKENS = {
  'token': normal(1, 1, 1, 4),
  'query': normal(2, 1, 2, 4),
  'w': normal(3, 4, 4),
  'head': normal(4, 4, 3),
  'two': normal(5, 2, 3),
}


def query_by_matmul(repeat):
  """The same, multiplied by the operator, which drops axes of size 1."""

  def apply(v, x):
    queries = repeat(v['query'], len(x)) @ v['w']
    keys = x @ v['w']
    return (jax.nn.softmax(queries @ keys.mT) @ keys).mean(1) @ v['head']

  return apply


REPEATS = {
  'broadcast': lambda q, count: jnp.broadcast_to(q, (count, 2, 4)),
  'tile': lambda q, count: jnp.tile(q, (count, 1, 1)),
  'repeat': lambda q, count: jnp.repeat(q, count, axis=0),
  'vmap': lambda q, count: jax.vmap(lambda _: q[0])(jnp.zeros(count)),
}


@pytest.mark.parametrize('repeat', REPEATS)
@pytest.mark.parametrize('form', [query, query_by_matmul])
def test_what_is_repeated_along_the_batch_is_one_tensor(repeat, form):
  apply = form(REPEATS[repeat])
  many = transform.inspect(apply, TOKENS, IMAGES)
  alone = transform.inspect(apply, TOKENS, IMAGES[:1])
  assert many.quantizers == alone.quantizers
  assert many.operations == alone.operations
  weights = [q.elements for q in many.quantizers if q.is_weight]
  assert sorted(weights) == [2 * 4, 4 * 3, 4 * 4]


def one_by_one(quantized, bits):
  rows = [quantized.apply(TOKENS, IMAGES[i : i + 1], bits) for i in (0, 5)]
  return jnp.concatenate(rows)


@pytest.mark.parametrize(
  'apply',
  [
    with_class_token,
    query(REPEATS['tile']),
    query_by_matmul(REPEATS['tile']),
    lambda v, x: (
      (jnp.broadcast_to(v['query'], (len(x), 2, 4)) @ x.mT).mean(2) @ v['two']
    ),
  ],
  ids=['token', 'query', 'matmul', 'no projection'],
)
def test_images_together_are_as_one_by_one(apply):
  quantized = nemo_jax.quantize(apply, TOKENS, IMAGES, calibration='min_max')
  bits = np.full(len(names(quantized)), 3)
  steps = ('rounding', 'bias')
  ready = reconstruct(quantized, TOKENS, IMAGES, steps=steps, chunk=4)
  assert ready.bank.codes
  for one in (quantized, ready):
    together = one.apply(TOKENS, IMAGES, bits)[np.asarray([0, 5])]
    np.testing.assert_allclose(together, one_by_one(one, bits), atol=1e-4)
  found = quantized.apply(TOKENS, IMAGES, np.full(len(bits), 32))
  np.testing.assert_allclose(found, apply(TOKENS, IMAGES), rtol=1e-5)


BY_PLACE = {
  'w': normal(5, 4, 3),
  'state': normal(6, 6, 4),
  'experts': normal(7, 3, 4, 3),
  'ids': jnp.asarray([0, 1, 2, 0, 1, 2]),
}


def choose_experts(v, x):
  own = v['experts'][v['ids'][: len(x)]]
  return jnp.einsum('btd,bde->bte', x, own)


@pytest.mark.parametrize(
  ('apply', 'words'),
  [
    (lambda v, x: (x.mean(1) + v['state']) @ v['w'], 'be traced for 2 of the'),
    (lambda v, x: x.reshape(6, 5, 4) @ v['w'], 'cannot be traced for 2 of the'),
    (lambda v, x: x.sum(0) @ v['w'], "'w' is a dense of 30"),
    (
      lambda v, x: (x - x.mean(0)) @ v['w'],
      "operand of 'div' is another for 6",
    ),
    (lambda v, x: (x / len(x)) @ v['w'], "operand of 'div' is another for 6"),
    (lambda v, x: x @ (v['w'] / len(x)), "operand of 'dot_general'"),
    (
      lambda v, x: (x + v['state'][: len(x), None]) @ v['w'],
      "operand of 'add' is another .*, .2, 1, 4. and .6, 1, 4.;",
    ),
    (choose_experts, "operand of 'dot_general' is another"),
    (
      lambda v, x: jnp.einsum(
        'bi,bij->bj',
        x[:, 0],
        (jnp.arange(len(x)) + 1.0)[:, None, None] * v['w'],
      ),
      "operand of 'dot_general' is another.*.2, 4, 3. and .6, 4, 3.",
    ),
    (
      lambda v, x: (
        x @ v['w'] if len(x) < 4 else jnp.tanh(x) @ v['w'] @ v['w'].T
      ),
      'other operations for 6 examples',
    ),
    (
      lambda v, x: x @ v['w'] + (0 if len(x) < 4 else (x @ x.mT).sum()),
      "'matmul' became 'w'|'w' became 'matmul'|2 and 4 operands",
    ),
  ],
  ids=[
    'state',
    'reshape',
    'sum',
    'mean',
    'count',
    'weight by count',
    'state by place',
    'experts by place',
    'weight by place',
    'branch',
    'more',
  ],
)
def test_a_function_that_treats_images_by_their_number_is_refused(apply, words):
  with pytest.raises(InputError, match=words) as raised:
    nemo_jax.quantize(apply, BY_PLACE, IMAGES)
  assert len(str(raised.value).splitlines()) == 1
  # With shapes alone as well, but for what certain values decide.
  if apply is not choose_experts:
    shapes = jax.eval_shape(lambda: BY_PLACE)
    with pytest.raises(InputError, match=words):
      transform.inspect(apply, shapes, jax.eval_shape(lambda: IMAGES))


def test_a_choice_by_place_within_an_image_is_fine():
  def apply(v, x):
    last = x[jnp.arange(len(x)), jnp.argmax(x[..., 0], axis=1)]
    return last @ v['w']

  quantized = nemo_jax.quantize(apply, WEIGHT, IMAGES, calibration='min_max')
  found = quantized.apply(WEIGHT, IMAGES, np.full(2, 32))
  np.testing.assert_allclose(found, apply(WEIGHT, IMAGES), rtol=1e-6)


def test_another_number_of_images_later_is_refused_where_it_matters():
  apply = lambda v, x: x @ v['w'] if len(x) < 7 else x @ v['w'] @ v['w'].T
  quantized = nemo_jax.quantize(apply, WEIGHT, IMAGES, calibration='min_max')
  quantized.apply(WEIGHT, IMAGES[:3], np.full(2, 4))
  with pytest.raises(InputError, match='other operations for 12 examples'):
    quantized.apply(WEIGHT, jnp.tile(IMAGES, (2, 1, 1)), np.full(2, 4))


def test_a_bank_survives_a_trace_with_other_equations():
  layers = {'a': {'w': normal(1, 4, 4)}, 'b': {'w': normal(2, 4, 3)}}
  plain = lambda v, x: jax.nn.relu(x @ v['a']['w']) @ v['b']['w']

  def another(v, x):
    x = jax.lax.add(jax.lax.mul(x, 1.0), 0.0)
    return jnp.maximum(x @ v['a']['w'].astype(jnp.float32), 0) @ v['b']['w']

  one, two = (
    nemo_jax.quantize(f, layers, IMAGES, calibration='min_max')
    for f in (plain, another)
  )
  assert one.program.equations != two.program.equations
  assert one.analysis.sites == two.analysis.sites
  bank = reconstruct(one, layers, IMAGES, steps=('rounding',)).bank
  assert bank.codes
  bits = np.full(4, 3)
  np.testing.assert_array_equal(
    two.apply(layers, IMAGES, bits, bank), one.apply(layers, IMAGES, bits, bank)
  )
