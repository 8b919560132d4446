"""The digits workload, and mixed precision on it."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemo_jax import InputError, quantize, workloads
from nemo_jax.quantization import costs
from nemo_jax.quantization.numerics import widths as widths_lib
from nemo_jax.search.evaluate import evaluate
from nemo_jax.tasks import mixed_precision, scoring
from nemo_jax.tasks import objectives as objectives_lib
from nemo_jax.workloads import digits as digits_lib

UNIFORM_8 = 6  # index of 8 bits among 2..8


@pytest.fixture(scope='module')
def quantized(digits):
  return quantize(digits.apply, digits.variables, digits.calibration.images)


@pytest.fixture(scope='module')
def problem(digits, quantized):
  return mixed_precision.make_problem(
    quantized,
    digits.variables,
    *digits.search,
    objectives=objectives_lib.NAMES,
  )


@pytest.fixture(scope='module')
def uniform(problem):
  """Objectives [K, M] of the uniform configurations, by name."""
  values = jax.jit(evaluate)(problem, mixed_precision.uniform(problem))
  names = problem.objective_names
  return dict(zip(names, np.asarray(values).T, strict=True))


def test_the_network_is_accurate_on_images_it_never_saw(digits):
  logits = jax.jit(digits.apply)(digits.variables, digits.test.images)
  error = jnp.mean(~objectives_lib.in_top_k(logits, digits.test.labels, 1))
  assert float(error) <= 0.03


def test_images_of_the_three_uses_are_apart(digits):
  train, search, test = (
    {image.tobytes() for image in part.images} for part in digits_lib.split()
  )
  assert not train & search
  assert not train & test
  assert not search & test
  assert len(train) + len(search) + len(test) == 1797
  assert {x.tobytes() for x in digits.calibration.images} < train
  assert {x.tobytes() for x in digits.search.images} == search
  assert {x.tobytes() for x in digits.test.images} == test


def test_classes_are_in_balance():
  for part in digits_lib.split():
    counts = np.bincount(part.labels, minlength=10)
    assert counts.max() - counts.min() <= 0.1 * len(part.labels)


def test_layers_of_every_kind(quantized):
  kinds = {operation.kind for operation in quantized.operations}
  assert {'conv', 'depthwise', 'pointwise', 'dense'} <= kinds
  assert len(quantized.quantizers) == 20


def test_macs_by_hand(quantized):
  by_hand = {
    'stem': 64 * 9 * 1 * 16,
    'block1_conv1': 64 * 9 * 16 * 16,
    'block1_conv2': 64 * 9 * 16 * 16,
    'block2_expand': 64 * 16 * 32,
    'block2_depthwise': 16 * 9 * 32,
    'block2_project': 16 * 32 * 32,
    'block3_expand': 16 * 32 * 64,
    'block3_depthwise': 16 * 9 * 64,
    'block3_project': 16 * 64 * 32,
    'classifier': 32 * 10,
  }
  assert {o.name: o.macs for o in quantized.operations} == by_hand


def test_eight_bits_are_within_a_point_of_float(digits, quantized, problem):
  plain = widths_lib.float_bits(len(quantized.quantizers))
  bits = np.stack([plain, np.full_like(plain, 8)])
  scores = scoring.accuracy(quantized, digits.variables, *digits.test, bits)
  top1, top5 = scores.T
  assert abs(top1[0] - top1[1]) <= 0.01
  assert np.all(top5 >= top1)
  logits = jax.jit(digits.apply)(digits.variables, digits.test.images)
  error = jnp.mean(~objectives_lib.in_top_k(logits, digits.test.labels, 1))
  assert top1[0] == np.float32(1 - error)


def test_beyond_sixteen_bits_the_network_is_the_float_one(digits, quantized):
  bits = jnp.full(len(quantized.quantizers), 17)
  images = digits.test.images
  plain = jax.jit(digits.apply)(digits.variables, images)
  same = jax.jit(quantized.apply)(digits.variables, images, bits)
  np.testing.assert_array_equal(plain, same)


def test_more_bits_are_closer_to_float(uniform):
  assert np.all(np.diff(uniform['divergence']) < 0)
  assert uniform['divergence'][UNIFORM_8] < 1e-3
  assert np.all(uniform['top5_error'] <= uniform['top1_error'])


def test_costs_of_the_objectives_are_the_exact_ones(uniform, quantized):
  table = quantized.costs
  for row, bits in enumerate(widths_lib.DEFAULT):
    widths = np.full(len(quantized.quantizers), bits)
    size = costs.model_size(table, widths) / (32 * table.parameters)
    np.testing.assert_allclose(uniform['size'][row], size, rtol=1e-6)
    np.testing.assert_allclose(
      uniform['bit_operations'][row], bits**2 / 32**2, rtol=1e-6
    )
    np.testing.assert_allclose(
      uniform['bit_operations_larger'][row], bits / 32, rtol=1e-6
    )


def test_performance_is_that_of_numpy(digits, problem, quantized, uniform):
  bits = jnp.full(len(quantized.quantizers), 4)
  images, labels = digits.search
  logits = np.asarray(
    jax.jit(quantized.apply)(digits.variables, images, bits), np.float64
  )
  order = np.argsort(-logits, axis=1)
  top1 = np.mean(order[:, 0] != labels)
  top5 = np.mean((order[:, :5] != labels[:, None]).all(axis=1))
  soft = lambda x: x - np.log(np.exp(x).sum(axis=1, keepdims=True))
  entropy = -np.mean(soft(logits)[np.arange(len(labels)), labels])
  target = soft(np.asarray(digits.apply(digits.variables, images), np.float64))
  divergence = (np.exp(target) * (target - soft(logits))).sum(axis=1).mean()
  row = 2  # 4 bits
  np.testing.assert_allclose(uniform['top1_error'][row], top1, atol=0.003)
  np.testing.assert_allclose(uniform['top5_error'][row], top5, atol=0.003)
  np.testing.assert_allclose(uniform['cross_entropy'][row], entropy, rtol=1e-3)
  np.testing.assert_allclose(uniform['divergence'][row], divergence, rtol=1e-2)


def test_a_network_that_says_nothing_scores_nothing():
  labels = jnp.zeros(4, jnp.int32)
  for value in (0.0, jnp.nan, jnp.inf):
    logits = jnp.full((4, 10), value)
    assert not objectives_lib.in_top_k(logits, labels, 1).any()


def test_guessing_and_the_widest_bits_bound_the_reference(problem, uniform):
  reference = dict(
    zip(problem.objective_names, problem.reference.tolist(), strict=True)
  )
  assert reference['top1_error'] == pytest.approx(0.9)
  assert reference['cross_entropy'] == pytest.approx(np.log(10))
  for name in objectives_lib.COSTS:
    assert uniform[name].max() < reference[name] < 1.2 * uniform[name].max()


def test_one_program_evaluates_every_configuration(problem):
  run = jax.jit(lambda problem, choices: evaluate(problem, choices))
  for seed in range(3):
    choices = jax.random.randint(jax.random.key(seed), (2, 20), 0, 7)
    run(problem, choices)
  assert run._cache_size() == 1


@pytest.mark.slow
def test_batches_of_candidates_score_the_same(problem):
  choices = jax.random.randint(jax.random.key(0), (6, 20), 2, 7)
  one = jax.jit(evaluate)(problem, choices)
  run = jax.jit(functools.partial(evaluate, batch_size=4))
  np.testing.assert_allclose(one, run(problem, choices), atol=5e-3)


@pytest.mark.parametrize(
  ('objectives', 'widths', 'words'),
  [
    (
      ('error', 'size'),
      (2, 8),
      "objective 'error'; the choices are top1",
    ),
    (('top1_error',), (2, 8), 'two or more'),
    (('size', 'size'), (2, 8), 'each once'),
    (('top1_error', 'size'), (8, 2), 'ascending'),
    (('top1_error', 'size'), (1, 8), 'from 2 to 16'),
    (('top1_error', 'size'), (8,), 'two or more'),
    (('top1_error', 'size'), (2.5, 4), 'whole numbers'),
    ((), (2, 8), 'two or more'),
  ],
)
def test_options_that_cannot_be_searched(
  digits, quantized, objectives, widths, words
):
  with pytest.raises(InputError, match=words):
    mixed_precision.make_problem(
      quantized,
      digits.variables,
      *digits.search,
      objectives=objectives,
      bit_widths=widths,
    )


def test_unknown_workloads_list_the_known(tmp_path):
  with pytest.raises(InputError, match="unknown workload 'mnist'.*digits"):
    workloads.load('mnist', tmp_path)


@pytest.fixture
def kept(tmp_path, cache, digits):
  """A copy of the file that the trained weights are kept in."""
  train_images, _, _ = digits_lib.split()
  path = digits_lib._weights_file(cache, train_images, digits_lib.Training())
  (tmp_path / path.name).write_bytes(path.read_bytes())
  return tmp_path / path.name


def same(one, other):
  equal = jax.tree.map(np.array_equal, one, other)
  return all(jax.tree.leaves(equal))


@pytest.mark.parametrize('damage', ['cut', 'byte', 'other'])
def test_damaged_weights_are_trained_again(digits, kept, monkeypatch, damage):
  content = kept.read_bytes()
  if damage == 'cut':
    kept.write_bytes(content[:1000])
  elif damage == 'byte':
    kept.write_bytes(
      content[:9000] + bytes([content[9000] ^ 1]) + content[9001:]
    )
  else:
    np.savez(kept, a=np.ones(1))
  trained = []

  def train(images, recipe):
    trained.append(recipe)
    return digits.variables

  monkeypatch.setattr(digits_lib, 'train', train)
  words = f'{kept.name} is damaged: .*; it is made again'
  with pytest.warns(UserWarning, match=words):
    found = workloads.load('digits', kept.parent)
  assert trained == [digits_lib.Training()]
  assert same(found.variables, digits.variables)
  assert same(workloads.load('digits', kept.parent).variables, digits.variables)
  assert len(trained) == 1


@pytest.mark.slow
def test_weights_that_are_trained_again_are_equal_bit_for_bit(digits):
  train_images, _, _ = digits_lib.split()
  again = digits_lib.train(train_images, digits_lib.Training())
  assert same(jax.device_get(again), digits.variables)


def test_kept_weights_are_named_by_what_decides_them(tmp_path):
  train_images, search_images, _ = digits_lib.split()
  recipe = digits_lib.Training()
  name = lambda *what: digits_lib._weights_file(tmp_path, *what).name
  names = {
    name(train_images, recipe._replace(**{field: getattr(recipe, field) + 1}))
    for field in recipe._fields
  }
  names |= {name(search_images, recipe), name(train_images, recipe)}
  assert len(names) == len(recipe._fields) + 2
  # Of numbers, shapes and images: a comment in the code changes nothing.
  assert name(train_images, recipe) == 'digits-c8bff061b3ac.npz'


@pytest.mark.parametrize(
  ('change', 'words'),
  [
    (lambda y: y + 1, 'labels go from 1 to 10; classes are whole numbers'),
    (lambda y: y - 1, 'labels go from -1 to 8'),
    (lambda y: y + 0.5, 'whole numbers'),
    (lambda y: y[:1], r'shape \(1,\); there are 400 inputs'),
    (lambda y: y[:, None], r'shape \(400, 1\)'),
  ],
)
def test_labels_that_are_no_classes_are_refused(
  digits, quantized, change, words
):
  images, labels = digits.search
  with pytest.raises(InputError, match=words):
    mixed_precision.make_problem(
      quantized, digits.variables, images, change(labels)
    )


def test_a_label_that_is_no_class_is_an_error():
  logits = jnp.ones((3, 10))
  assert not objectives_lib.in_top_k(logits, jnp.arange(10, 13), 1).any()


def test_choices_that_leave_nothing_are_refused(digits, quantized):
  for allowed, words in (
    (np.zeros((20, 7), bool), 'leaves quantizer 0 no bit-width'),
    (np.ones((3, 7), bool), r'shape \(3, 7\); .* \(20, 7\)'),
  ):
    with pytest.raises(InputError, match=words):
      mixed_precision.make_problem(
        quantized, digits.variables, *digits.search, allowed=allowed
      )


@pytest.mark.parametrize(
  ('move', 'percent'),
  [
    (lambda labels: (labels + 1) % 10, 0),
    # As folders named 0, 1, 10, 11, ... in the order of their text: a few
    # classes stay in place.
    (lambda labels: np.where(labels < 2, labels, 2 + (labels - 1) % 8), 20),
  ],
)
def test_labels_in_another_order_are_warned_of(
  digits, quantized, move, percent
):
  words = f'is right on {percent}.*little better than guessing .10.0 %'
  labels = move(digits.search.labels)
  images = digits.search.images
  with pytest.warns(UserWarning, match=words):
    mixed_precision.make_problem(quantized, digits.variables, images, labels)
  bits = widths_lib.float_bits(len(quantized.quantizers))[None]
  with pytest.warns(UserWarning, match=words):
    scoring.accuracy(quantized, digits.variables, images, labels, bits)


def test_labels_in_the_right_order_are_not_warned_of(digits, quantized):
  bits = widths_lib.float_bits(len(quantized.quantizers))[None]
  with warnings.catch_warnings(action='error', category=UserWarning):
    mixed_precision.make_problem(quantized, digits.variables, *digits.search)
    scoring.accuracy(quantized, digits.variables, *digits.search, bits)
    # What two bits do to a network is no fault of the labels.
    scoring.accuracy(
      quantized, digits.variables, *digits.search, np.full_like(bits, 2)
    )
