"""Published networks on real images: accuracy, and the experiments on them."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.flags import FLAGS
from absl.testing import flagsaver

from experiments import evaluate
from nemo_jax import Front, InputError, Point, quantize, workloads
from nemo_jax.quantization.backend import lowering
from nemo_jax.quantization.numerics import widths as widths_lib
from nemo_jax.quantization.transform import inspect
from nemo_jax.tasks import scoring
from tests import conftest

# What takes time is reconstruction, which has tests of its own.
QUICK = '--reconstruct='


@pytest.fixture(scope='module')
def mobilenet(shared, imagenet_tfds, cache):
  return workloads.load(
    'mobilenet_v2',
    cache,
    weights=str(shared / 'weights' / 'mobilenet_v2.pth'),
    data=str(imagenet_tfds),
    validation=str(shared / 'imagenet' / 'val'),
    validation_resize=0,
    search_images=500,
  )


def flags(shared, cache, *more):
  return [
    f'--cache={cache}',
    '--workload=cifar10_resnet20',
    f'--weights={shared / "weights" / "cifar10_resnet20.th"}',
    f'--data={shared / "cifar10" / "train4000.npz"}',
    *more,
  ]


def run(module, *flags):
  return subprocess.run(
    [sys.executable, '-m', f'experiments.{module}', *flags],
    cwd=conftest.ROOT,
    capture_output=True,
    text=True,
    check=False,
  )


def refused(done, *words):
  assert done.returncode != 0
  (line,) = [x for x in done.stderr.splitlines() if 'rror' in x]
  assert line.startswith('error: ')
  for word in words:
    assert word in line


def test_images_of_imagenet_are_apart_and_even(mobilenet):
  parts = mobilenet.calibration, mobilenet.search, mobilenet.test
  assert [len(p.labels) for p in parts] == [256, 500, 800]
  assert len(set(mobilenet.search.labels.tolist())) == 500
  digests = [{x.tobytes() for x in p.images} for p in parts]
  assert sum(map(len, digests)) == len(set().union(*digests)) == 1556
  for part in parts:
    assert part.images.dtype == np.uint8
    assert part.images.shape[1:] == (224, 224, 3)


@pytest.mark.slow
def test_mobilenet_is_as_accurate_as_its_weights_are(mobilenet):
  """78.50 % is what PyTorch measured with these weights on these images."""
  quantized = quantize(
    mobilenet.apply,
    mobilenet.variables,
    mobilenet.calibration.images[:64],
    calibration='min_max',
    lowering='backend',
  )
  plain = widths_lib.float_bits(len(quantized.quantizers))
  rows = np.stack([plain, np.full_like(plain, 8)])
  scores = scoring.accuracy(
    quantized, mobilenet.variables, *mobilenet.test, rows
  )
  assert abs(scores[0, 0] - 0.7850) <= 0.003
  assert abs(scores[0, 1] - 0.9438) <= 0.003
  assert scores[1, 0] >= scores[0, 0] - 0.01


def logits_of(workload, images, lowering, max_bits):
  """A compiled function from bits to the logits of some test images."""
  quantized = quantize(
    workload.apply,
    workload.variables,
    workload.calibration.images[:32],
    calibration='min_max',
    lowering=lowering,
  )
  shown = workload.test.images[:images]

  @jax.jit
  def run(bits):
    variables = workload.variables
    return quantized.apply(variables, shown, bits, max_bits=max_bits)

  count = len(quantized.quantizers)
  return lambda width: np.asarray(run(jnp.full(count, width)))


def check_products(workload, images, products, monkeypatch):
  """Every product of the fast path is the traced one, at every width.

  Whole logits differ: where a processor fuses a scale into a sum the last
  digit changes, and may tip a code.
  """
  equal = []

  def both(equation, operands, narrow=False):
    plain = lowering.as_traced(equation, operands)
    fast = lowering.for_backend(equation, operands, narrow)
    jax.debug.callback(
      lambda same: equal.append(bool(same)), (plain == fast).all()
    )
    return fast

  monkeypatch.setitem(lowering.LOWERINGS, 'both', both)
  run = logits_of(workload, images, 'both', 8)
  jax.effects_barrier()
  equal.clear()
  for width in range(2, 9):
    run(width)
    jax.effects_barrier()
    assert len(equal) == products
    assert all(equal), width
    equal.clear()


def test_every_product_of_the_fast_path_is_exact_on_real_weights(
  shared, cache, monkeypatch
):
  workload = workloads.load(
    'cifar10_resnet20',
    cache,
    weights=str(shared / 'weights' / 'cifar10_resnet20.th'),
    data=str(shared / 'cifar10' / 'train4000.npz'),
    search_images=0,
  )
  check_products(workload, 32, 20, monkeypatch)


@pytest.mark.slow
def test_every_product_of_mobilenet_is_exact_on_real_weights(
  mobilenet, monkeypatch
):
  check_products(mobilenet, 8, 53, monkeypatch)


@pytest.mark.slow
def test_resnet50_is_as_accurate_as_in_pytorch(shared, imagenet_tfds, cache):
  """79.375 % is what PyTorch measured with these weights on these images."""
  workload = workloads.load(
    'resnet50',
    cache,
    weights=str(shared / 'weights' / 'resnet50.pth'),
    data=str(imagenet_tfds),
    validation=str(shared / 'imagenet' / 'val'),
    validation_resize=0,
    search_images=0,
  )
  accuracy = {}
  for method in ('least_squares', 'min_max'):
    quantized = quantize(
      workload.apply,
      workload.variables,
      workload.calibration.images,
      calibration=method,
      lowering='backend',
    )
    plain = widths_lib.float_bits(len(quantized.quantizers))
    rows = np.stack([plain, np.full_like(plain, 8), np.full_like(plain, 4)])
    scores = scoring.accuracy(
      quantized, workload.variables, *workload.test, rows
    )
    accuracy[method] = scores[:, 0]
  best, bounds = accuracy['least_squares'], accuracy['min_max']
  assert abs(best[0] - 0.79375) <= 0.003
  assert best[1] >= best[0] - 0.01
  assert best[2] > bounds[2] + 0.1


@pytest.mark.slow
def test_resnext_runs_quantized_at_full_size():
  network = workloads.network('resnext101_32x8d')
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    if path[-1].key == 'kernel':
      deviation = (2 / np.prod(leaf.shape[:-1])) ** 0.5
      return rng.normal(0, deviation, leaf.shape).astype(np.float32)
    # Small enough in a branch that a hundred layers do not overflow.
    is_last = path[-2].key.endswith('bn3')
    value = 0.0 if path[-1].key == 'bias' else 0.2 if is_last else 1.0
    return np.full(leaf.shape, value, np.float32)

  variables = jax.tree_util.tree_map_with_path(draw, network.variables)
  image = rng.integers(0, 256, network.images.shape, np.uint8)
  quantized = quantize(
    network.apply,
    variables,
    image,
    extra_ops=('add', 'pool'),
    calibration='min_max',
    lowering='backend',
  )
  assert len(quantized.quantizers) == 244
  run = jax.jit(quantized.apply)
  plain, eight, two = (
    np.asarray(run(variables, image, jnp.full(244, b))) for b in (17, 8, 2)
  )
  assert plain.shape == (1, 1000)
  expected = np.asarray(jax.jit(network.apply)(variables, image))
  np.testing.assert_allclose(plain, expected, atol=1e-4 * abs(expected).max())
  error = lambda x: np.linalg.norm(x - plain) / np.linalg.norm(plain)
  assert 0 < error(eight) < 0.2 < error(two)


@pytest.mark.slow
def test_evaluate_prints_a_line_for_each_configuration(shared, cache):
  done = run(
    'evaluate',
    *flags(shared, cache, '--test_images=500', '--bits=float,8,w4a8,4', QUICK),
  )
  assert done.returncode == 0, done.stderr
  lines = [json.loads(line) for line in done.stdout.splitlines()]
  names = [line['configuration'] for line in lines]
  assert names == ['float', '8', 'w4a8', '4']
  plain, eight, mixed, four = lines
  assert plain['top1'] >= 0.99
  assert eight['top1'] >= plain['top1'] - 0.01
  assert four['top1'] <= mixed['top1'] <= eight['top1']
  assert mixed['size_bits'] == four['size_bits'] < eight['size_bits']
  assert plain['bit_operations'] == 32 * 32 * 40_551_040
  assert mixed['bit_operations'] == 4 * 8 * 40_551_040
  assert all(line['images'] == 500 for line in lines)
  assert all(line['top5'] >= line['top1'] for line in lines)


@pytest.fixture
def front(tmp_path):
  """The folder of a front with two points."""
  structure = inspect(*workloads.network('cifar10_resnet20'))
  names = [q.name for q in structure.quantizers]
  Front(
    workload='cifar10_resnet20',
    objective_names=(),
    quantizers=tuple(names),
    points=tuple(Point(bits=(width,) * len(names)) for width in (8, 4)),
  ).save(tmp_path)
  return tmp_path


@pytest.mark.slow
def test_evaluate_scores_points_of_a_front(shared, cache, front):
  common = flags(shared, cache, '--test_images=200', QUICK)
  done = run('evaluate', *common, f'--front={front}', '--points=1')
  assert done.returncode == 0, done.stderr
  (line,) = [json.loads(line) for line in done.stdout.splitlines()]
  assert line['configuration'] == 'point 1'
  assert line['bit_operations'] == 4 * 4 * 40_551_040


@pytest.mark.parametrize(
  ('given', 'words'),
  [
    (['--bits=8,w4'], ("'w4'", 'float', 'w4a8')),
    (['--bits=1'], ("'1'", 'from 2 to 16')),
    (['--front={front}', '--points=2'], ("'2'", 'points 0 to 1')),
    (['--front={front}', '--extra_ops=add'], ('40 quantizers',)),
    (['--front=none'], ('none/front.json',)),
    (['--test_images=5000'], ('train4000.npz', '4000')),
    (['--image_size=16'], ('image_size is 16',)),
    (['--resize=20'], ('resize is 20',)),
    (['--weights=none.pth'], ('no file none.pth',)),
    (['--workload=digits'], ('digits', 'takes no')),
    (['--validation_resize=32'], ('train4000.npz', 'validation_resize')),
  ],
)
def test_evaluate_refuses_what_it_cannot_do(shared, cache, front, given, words):
  given = [word.format(front=front) for word in given]
  with flagsaver.flagsaver():
    FLAGS(['evaluate', *flags(shared, cache, *given)])
    with pytest.raises(InputError) as caught:
      evaluate.run()
  message = str(caught.value)
  assert '\n' not in message
  for word in words:
    assert word in message


def test_workloads_prints_the_table():
  given = ['--workload=resnext101_32x8d', '--extra_ops=add,pool']
  done = run('workloads', *given)
  assert done.returncode == 0, done.stderr
  assert 'quantizers   244: 105 weights, 139 activations' in done.stdout
  assert 'MACs         16,414,015,488' in done.stdout
  assert 'parameters   88,791,336' in done.stdout
  rows = [x for x in done.stdout.splitlines() if x.startswith('layer4.2.conv2')]
  assert len(rows) == 1
  assert '57,802,752' in rows[0]


def test_workloads_refuses_unknown_names():
  refused(run('workloads', '--workload=vgg'), "'vgg'", 'mobilenet_v2')


@pytest.mark.slow
def test_a_search_on_real_images_runs_to_its_end(shared, cache, tmp_path):
  given = flags(
    shared,
    cache,
    f'--workdir={tmp_path}',
    '--search_images=200',
    '--test_images=300',
    '--population=10',
    '--generations=3',
    '--extra_ops=add,pool',
    '--objectives=top5_error,size,bit_operations',
  )
  done = run('search', *given)
  assert done.returncode == 0, done.stderr
  front = Front.load(tmp_path)
  assert len(front.quantizers) == 50
  assert front.images['test'] == 300
  assert front.images['size'] == 32
  assert front.float_point.test_accuracy >= 0.99
  assert all(p.test_top5_accuracy >= p.test_accuracy for p in front.points)
  assert 'are done' in run('search', *given).stdout


def test_a_search_without_weights_says_what_is_missing(tmp_path, cache):
  given = [f'--cache={cache}', f'--workdir={tmp_path}', '--workload=resnet50']
  refused(run('search', *given, '--weights=none.pth'), 'no file none.pth')
