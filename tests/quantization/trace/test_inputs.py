"""Inputs: an array, or a tree of arrays with an example in every row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemo_jax import InputError, quantize
from nemo_jax.quantization import sensitivity, transform
from nemo_jax.quantization.ptq.reconstruct import reconstruct
from tests.quantization.networks import (
  IMAGES,
  WEIGHT,
  WORDS,
  assert_float_beyond_16_bits,
  normal,
  operands,
  quick_quantize,
  uniform,
)

# A tree of one array.

LAYERS = {'a': normal(1, 4, 6), 'b': normal(2, 6, 3)}
ROWS = normal(0, 9, 4)


def layers(v, x):
  return jax.nn.relu(x @ v['a']) @ v['b']


def of_leaf(v, tree):
  (x,) = jax.tree.leaves(tree)
  return layers(v, x)


TREES = {
  'tuple': lambda x: (x,),
  'list': lambda x: [x],
  'dict': lambda x: {'image': x},
  'nested': lambda x: {'a': [None, {'b': x}]},
}
each_tree = pytest.mark.parametrize('wrap', TREES.values(), ids=TREES.keys())


@each_tree
def test_a_tree_of_one_array_is_quantized_as_the_array(wrap):
  plain = quantize(layers, LAYERS, ROWS, chunk=4)
  wrapped = quantize(of_leaf, LAYERS, wrap(ROWS), chunk=4)
  assert wrapped.quantizers == plain.quantizers
  jax.tree.map(np.testing.assert_array_equal, wrapped.bank, plain.bank)
  bits = uniform(plain, 3)
  np.testing.assert_array_equal(
    wrapped.apply(LAYERS, wrap(ROWS), bits), plain.apply(LAYERS, ROWS, bits)
  )


@each_tree
def test_a_tree_of_one_array_is_reconstructed_as_the_array(wrap):
  plain, wrapped = (
    reconstruct(quick_quantize(apply, LAYERS, x), LAYERS, x, chunk=4).bank
    for apply, x in ((layers, ROWS), (of_leaf, wrap(ROWS)))
  )
  assert plain.codes
  jax.tree.map(np.testing.assert_array_equal, wrapped, plain)


@pytest.mark.parametrize('method', sensitivity.METHODS)
def test_a_tree_of_one_array_is_as_sensitive_as_the_array(method):
  options = {'key': jax.random.key(0), 'widths': (2, 8), 'chunk': 4}
  labels = np.arange(len(ROWS)) % 3
  plain, wrapped = (
    sensitivity.METHODS[method](
      quick_quantize(apply, LAYERS, x), LAYERS, x, labels, **options
    )
    for apply, x in ((layers, ROWS), (of_leaf, {'image': ROWS}))
  )
  assert np.any(plain)
  np.testing.assert_array_equal(wrapped, plain)


# Several arrays.


def read(v, x):
  """Words that a mask leaves, beside images that have a layer of their own."""
  words = v['table'][x['words']] * x['mask'][..., None]
  text = jnp.tanh(words @ v['text'])
  scores = jax.nn.softmax(jnp.einsum('btd,bsd->bts', text, x['images']))
  return jnp.einsum('bts,bsd->btd', scores, x['images']).mean(1) @ v['head']


VARIABLES = {
  'table': normal(3, 10, 4),
  'text': normal(4, 4, 4),
  'head': normal(5, 4, 3),
}
SEVERAL = {'words': WORDS, 'mask': WORDS > 2, 'images': IMAGES}


@pytest.fixture(scope='module')
def several():
  return quick_quantize(read, VARIABLES, SEVERAL)


def test_every_input_has_a_quantizer_where_products_read_it(several):
  assert operands(several) == [
    ('text', ['text:input', 'text']),
    ('matmul', ['matmul:lhs', 'matmul:rhs']),
    ('matmul#2', ['matmul#2:lhs', 'matmul:rhs']),
    ('head', ['head:input', 'head']),
  ]
  assert several.unread == ()


def test_a_function_of_several_inputs_is_itself_beyond_16_bits(several):
  assert_float_beyond_16_bits(several, read, VARIABLES, SEVERAL)


def test_shapes_of_several_inputs_tell_the_same_structure(several):
  shapes = jax.eval_shape(lambda: (VARIABLES, SEVERAL))
  found = transform.inspect(read, *shapes)
  assert found.quantizers == several.quantizers
  assert found.operations == several.operations
  assert found.bytes_per_image == several.structure.bytes_per_image


def test_memory_is_that_of_all_inputs_together():
  apply = lambda v, x: x['images'].mean(1) @ v['w'] + x['words'].sum()
  alone = lambda v, x: x['images'].mean(1) @ v['w']
  inputs = {'images': IMAGES, 'words': WORDS}
  both, one = (
    transform.inspect(f, WEIGHT, inputs).bytes_per_image for f in (apply, alone)
  )
  assert one >= 5 * 4 * 4
  assert both >= 5 * 4 * 4 + 5 * 4


def test_examples_of_several_inputs_are_taken_in_chunks(several):
  whole = several.bank
  parts = quick_quantize(read, VARIABLES, SEVERAL, chunk=4).bank
  for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize('count', [1, 2, 5])
def test_examples_of_several_inputs_together_are_as_one_by_one(several, count):
  few = jax.tree.map(lambda x: x[:count], SEVERAL)
  run = lambda x: several.apply(VARIABLES, x, uniform(several, 4))
  alone = [
    run(jax.tree.map(lambda x, i=i: x[i : i + 1], few)) for i in range(count)
  ]
  np.testing.assert_allclose(run(few), jnp.concatenate(alone), atol=1e-5)


# Arguments that are no arrays.


@pytest.mark.parametrize(
  ('variables', 'inputs', 'words'),
  [
    (WEIGHT, 3.0, '^inputs are a float; give arrays'),
    (WEIGHT, 'text', '^inputs are a str'),
    (WEIGHT, np.asarray([{}], object), '^inputs are a ndarray'),
    (WEIGHT, np.float32(3), '^inputs have no axes'),
    (WEIGHT, None, '^inputs have no array; give one'),
    (WEIGHT, {}, '^inputs have no array'),
    (WEIGHT, [None, ()], '^inputs have no array'),
    (WEIGHT, IMAGES[:0], 'there are no inputs; give at least one example'),
    (WEIGHT, {'x': IMAGES[:0]}, 'there are no inputs'),
    (WEIGHT, {'x': IMAGES, 'k': 3}, "^inputs 'k' are a int"),
    (WEIGHT, (IMAGES, jnp.ones(())), "^inputs '1' have no axes"),
    (
      WEIGHT,
      {'x': IMAGES, 'y': {'z': IMAGES[:4]}},
      "^inputs 'x' have 6 examples, inputs 'y/z' have 4",
    ),
    (WEIGHT | {'scale': 0.5}, IMAGES, "variable 'scale' is a float"),
    (WEIGHT | {'on': True}, IMAGES, "variable 'on' is a bool"),
    (WEIGHT | {'a': {'name': 'x'}}, IMAGES, "variable 'a/name' is a str"),
  ],
)
def test_arguments_that_are_no_arrays_are_refused(variables, inputs, words):
  apply = lambda v, x: x @ v['w']
  for call in (transform.inspect, quantize):
    with pytest.raises(InputError, match=words) as raised:
      call(apply, variables, inputs)
    assert len(str(raised.value).splitlines()) == 1


def test_a_quantized_function_refuses_them_too(several):
  quantized = quick_quantize(lambda v, x: x @ v['w'], WEIGHT, IMAGES)
  with pytest.raises(InputError, match='inputs are a float'):
    quantized.apply(WEIGHT, 3.0, np.full(2, 4))
  for bad, words in (
    ({'w': 'text'}, "variable 'w' is a str"),
    ({'w': WEIGHT['w'].T}, r"variable 'w' has shape \(3, 4\), not \(4, 3\)"),
    (WEIGHT | {'more': IMAGES}, 'there are 2 variables; the function has 1'),
  ):
    with pytest.raises(InputError, match=words):
      quantized.apply(bad, IMAGES, np.full(2, 4))
  with pytest.raises(InputError, match='there are no inputs'):
    quantized.apply(WEIGHT, IMAGES[:0], np.full(2, 4))
  uneven = SEVERAL | {'mask': SEVERAL['mask'][:3]}
  with pytest.raises(InputError, match="'images' have 6 .*'mask' have 3"):
    several.apply(VARIABLES, uneven, uniform(several, 4))
