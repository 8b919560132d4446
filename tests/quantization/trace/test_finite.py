"""Networks whose logits are not finite, or no logits at all."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nemo_jax
from nemo_jax import InputError, workloads
from nemo_jax.quantization import sensitivity
from nemo_jax.tasks import mixed_precision, scoring
from tests.quantization.networks import normal

IMAGES = normal(0, 8, 4)
LABELS = np.arange(8) % 3
# Untrained networks are as good as guessing, and told so.
pytestmark = pytest.mark.filterwarnings('ignore:the float network is right')


def problem(apply, variables, images=IMAGES):
  quantized = nemo_jax.quantize(apply, variables, images, calibration='min_max')
  return mixed_precision.make_problem(quantized, variables, images, LABELS)


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_a_last_bias_that_is_not_finite_is_named(bad):
  variables = {'head': {'w': normal(1, 4, 3), 'b': jnp.asarray([0, bad, 0])}}
  apply = lambda v, x: x @ v['head']['w'] + v['head']['b']
  with pytest.raises(InputError, match="8 of 8 inputs: .*'head/b' holds"):
    problem(apply, variables)


def test_a_negative_variance_is_named():
  class Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = nn.Dense(5)(x)
      x = nn.BatchNorm(use_running_average=True, name='norm')(x)
      return nn.Dense(3)(x)

  variables = Normed().init(jax.random.key(0), IMAGES)
  last = variables['batch_stats']['norm']['var']
  variables['batch_stats']['norm']['var'] = last.at[2].set(-1.0)
  with pytest.raises(InputError, match='not finite') as raised:
    problem(Normed().apply, variables)
  # What calibration sees is named as well as what comes after.
  assert 'Dense_1:input' in str(raised.value)


def test_a_negative_variance_after_the_last_layer_is_named():
  variables = {'w': normal(1, 4, 3), 'var': jnp.asarray([1.0, -1.0, 1.0])}
  apply = lambda v, x: (x @ v['w']) / jnp.sqrt(v['var'] + 1e-5)
  with pytest.raises(InputError, match="'sqrt' of the variable 'var'"):
    problem(apply, variables)


def test_logits_that_overflow_on_one_image_are_refused():
  variables = {'w': normal(1, 4, 3)}
  apply = lambda v, x: jnp.exp((x @ v['w']) ** 2)
  images = IMAGES.at[5].set(100.0)
  with pytest.raises(InputError, match="1 of 8 inputs: the operation 'exp'"):
    problem(apply, variables, images)


def test_masks_of_minus_infinity_inside_are_fine():
  def apply(v, x):
    scores = jnp.where(x > 0, x, -jnp.inf)
    return jax.nn.softmax(scores.at[:, 0].set(0.0)) @ v['w']

  made = problem(apply, {'w': normal(1, 4, 3)})
  assert np.isfinite(mixed_precision.float_objectives(made, 8)).all()


@pytest.mark.parametrize(
  ('apply', 'words'),
  [
    (lambda v, x: (x @ v['w'], x), 'outputs are a tuple; logits'),
    (lambda v, x: {'logits': x @ v['w']}, 'outputs are a dict'),
    (lambda v, x: [x @ v['w']], 'outputs are a list'),
    (lambda v, x: (x @ v['w'])[:, None], r'float32\[B, 1, 3\]'),
    (lambda v, x: (x @ v['w'])[:, 0], r'float32\[B\]'),
    (lambda v, x: (x @ v['w']).sum(), r'outputs are float32\['),
    (lambda v, x: (x @ v['w'])[:, :1], 'outputs are of one class'),
    (lambda v, x: jnp.argmax(x @ v['w'], -1)[:, None], r'int32\[B, 1\]'),
  ],
  ids=['tuple', 'dict', 'list', 'map', 'number', 'sum', 'one', 'classes'],
)
def test_outputs_that_are_no_logits_are_refused_at_once(apply, words):
  variables = {'w': normal(1, 4, 3)}
  quantized = nemo_jax.quantize(apply, variables, IMAGES, calibration='min_max')
  # The function itself may return anything.
  quantized.apply(variables, IMAGES, np.full(2, 8))
  some = variables, IMAGES, LABELS
  calls = [
    lambda: mixed_precision.make_problem(quantized, *some),
    lambda: scoring.accuracy(quantized, *some, np.full((1, 2), 8)),
    *(
      lambda method=method: method(
        quantized, *some, key=jax.random.key(0), widths=(2, 8)
      )
      for method in sensitivity.METHODS.values()
    ),
  ]
  for call in calls:
    with pytest.raises(InputError, match=words) as raised:
      call()
    assert len(str(raised.value).splitlines()) == 1


def test_a_workload_with_a_variable_that_is_not_finite_is_refused(
  monkeypatch, digits, cache
):
  variables = jax.tree.map(np.array, digits.variables)
  variables['params']['stem']['bias'][3] = np.nan
  bad = digits._replace(variables=variables)
  module = type('module', (), {'load': lambda sources: bad})
  monkeypatch.setattr(workloads, 'find', lambda name: module)
  with pytest.raises(InputError, match='stem/bias of digits holds values'):
    workloads.load('digits', cache)
