"""What a front.json has to hold."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_jax.core.types import InputError
from nemo_jax.runs import front, schema

POINT = {
  'bits': [2, 16],
  'objectives': [0.1, 0.25],
  'test_accuracy': 0.5,
  'species': 'direct',
}
UNIFORM = {'bits': [8, 8], 'objectives': [None, 0.25], 'test_accuracy': 1}
FRONT = {
  'version': 1,
  'workload': 'digits',
  'evaluations': 60,
  'failures': 0,
  'hypervolume': None,
  'uniform_hypervolume': 0.5,
  'objective_names': ['top1_error', 'size'],
  'quantizers': ['a:input', 'a/kernel'],
  'is_weight': [False, True],
  'bit_widths': [2, 8],
  'species': ['direct', 'gcn'],
  'float': {'objectives': [0.0, 1.0], 'test_accuracy': 0.9},
  'points': [POINT, POINT | {'species': 'gcn'}],
  'uniform': [UNIFORM],
}


def changed(path, value):
  """The front with another value at a path of keys; None deletes it."""
  made = json.loads(json.dumps(FRONT))
  holder = made
  for key in path[:-1]:
    holder = holder[key]
  if value is None:
    del holder[path[-1]]
  else:
    holder[path[-1]] = value
  return made


@pytest.mark.parametrize('version', [1, 2])
def test_a_front_is_returned_as_it_is(version):
  content = FRONT | {'version': version, 'sha256': 'ab', 'more': [{}]}
  assert schema.validate(content, 'front.json', schema.REPORTED) is content


def test_a_front_without_points_is_one():
  content = FRONT | {'points': [], 'uniform': []}
  assert schema.validate(content, 'front.json', schema.REPORTED) == content


@pytest.mark.parametrize(
  ('path', 'value', 'words'),
  [
    (['version'], 3, 'it has version 3; this package reads 1 and 2'),
    (['version'], True, 'it has version True'),
    (['version'], 1.0, 'it has version 1.0'),
    (['version'], None, 'it has version None'),
    (['workload'], 'a\nb', 'workload is'),
    (['workload'], 7, 'workload is 7, not a text'),
    (['evaluations'], -1, 'evaluations is -1, not a whole number'),
    (['evaluations'], 10**400, 'evaluations is a number of over 18 digits'),
    (['failures'], 0.5, 'failures is 0.5'),
    (['hypervolume'], math.nan, 'hypervolume is nan'),
    (['objective_names'], [], 'objective_names has 0 values, not 1'),
    (['objective_names'], 'ab', "objective_names is 'ab', no list"),
    (['quantizers'], ['a', 'a'], "quantizers has 'a' twice"),
    (['quantizers', 1], {}, r'quantizers[1] is an object, not a text'),
    (['quantizers'], ['a'], 'is_weight has 2 values, not 1'),
    (['is_weight', 0], 0, 'is_weight[0] is 0, not true or false'),
    (['bit_widths', 1], 17, 'bit_widths[1] is 17, not a whole number from 2'),
    (['float'], 'x', "float is 'x', no object"),
    (['float', 'objectives', 0], math.inf, 'float.objectives[0] is inf'),
    (['float', 'test_accuracy'], 1.5, 'float.test_accuracy is 1.5'),
    (['points'], {}, 'points is an object, no list'),
    (['points', 1], 7, 'points[1] is 7, no object'),
    (['points', 1, 'bits'], [2], 'points[1].bits has 1 values, not 2'),
    (['points', 1, 'bits', 0], -4, 'points[1].bits[0] is -4, not a whole'),
    (['points', 1, 'bits', 0], 4.7, 'points[1].bits[0] is 4.7'),
    (['points', 1, 'bits', 0], 4.0, 'points[1].bits[0] is 4.0'),
    (['points', 1, 'bits', 0], 10**12, 'points[1].bits[0] is 1000000000000'),
    (['points', 1, 'bits', 0], '4', "points[1].bits[0] is '4'"),
    (['points', 1, 'bits', 0], True, 'points[1].bits[0] is True'),
    (['points', 1, 'bits'], None, 'points[1].bits is missing'),
    (['points', 0, 'objectives', 1], math.nan, 'points[0].objectives[1] is n'),
    (['points', 0, 'objectives'], [0.1] * 3, 'objectives has 3 values, not 2'),
    (['points', 0, 'test_accuracy'], -0.1, 'points[0].test_accuracy is -0.1'),
    (['points', 0, 'species'], 'ants', "points[0].species is 'ants', which is"),
    (['uniform', 0, 'bits', 1], 1, 'uniform[0].bits[1] is 1'),
    (['uniform', 0, 'objectives', 0], 10**400, 'uniform[0].objectives[0] is a'),
  ],
)
def test_the_culprit_is_named(path, value, words):
  with pytest.raises(InputError) as caught:
    schema.validate(changed(path, value), 'runs/front.json', schema.REPORTED)
  message = str(caught.value)
  assert message.startswith('runs/front.json is no front: ')
  assert words in message
  assert '\n' not in message
  assert len(message) < 200


@pytest.mark.parametrize('name', schema.REPORTED)
def test_keys_that_are_needed_are_named_if_they_are_missing(name):
  section, _, key = name.rpartition('.')
  steps = {'': [], 'float': ['float']}.get(section, [section, 0])
  content = changed([*steps, key], None)
  with pytest.raises(InputError, match=r'is missing$') as caught:
    schema.validate(content, 'front.json', schema.REPORTED)
  assert key in str(caught.value)
  # Others may be absent.
  schema.validate(content, 'front.json', set(schema.REPORTED) - {name})


@pytest.mark.parametrize('content', [None, 7, 'x', [], [FRONT]])
def test_what_is_no_object_is_no_front(content):
  with pytest.raises(InputError, match='no object'):
    schema.validate(content, 'front.json')


anything = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
  lambda inner: (
    st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
  ),
  max_leaves=5,
)


@given(st.data())
def test_any_change_is_refused_or_leaves_a_front(data):
  content = json.loads(json.dumps(FRONT))
  holder, steps = content, 0
  while isinstance(holder, dict | list) and holder and steps < 4:
    keys = list(holder) if isinstance(holder, dict) else range(len(holder))
    key = data.draw(st.sampled_from(list(keys)))
    if steps == 3 or data.draw(st.booleans()):
      holder[key] = data.draw(anything)
      break
    holder, steps = holder[key], steps + 1
  try:
    schema.validate(content, 'front.json', schema.REPORTED)
  except InputError as error:
    message = str(error)
  else:
    message = ''
  assert len(message.splitlines()) <= 1
  if message:
    return
  # Whatever remains can be used as a front.
  for point in content['points']:
    assert len(point['bits']) == len(content['quantizers'])
    assert all(2 <= bits <= 16 for bits in point['bits'])
    assert all(math.isfinite(x) for x in point['objectives'])


@pytest.mark.parametrize(
  'text',
  [
    '',
    '7',
    '[' * 100_000,
    '{"version": ' + '[' * 100_000,
    '{"version": 1, "points": ' + '{"a":' * 100_000,
    '\x00\xff',
    '{"version": 1',
  ],
)
def test_files_that_hold_no_object_are_named(tmp_path, text):
  (tmp_path / 'front.json').write_text(text)
  with pytest.raises(InputError, match='front.json') as caught:
    front.read(tmp_path)
  assert len(str(caught.value).splitlines()) == 1


def test_a_huge_file_is_refused_before_it_is_read(tmp_path):
  with open(tmp_path / 'front.json', 'wb') as file:
    file.truncate(2**29)
  with pytest.raises(InputError, match=r'front.json .*has over \d+ bytes'):
    front.read(tmp_path)


def test_a_stored_front_is_read(tmp_path):
  (tmp_path / 'front.json').write_text(json.dumps(FRONT))
  assert front.read(tmp_path, schema.REPORTED) == FRONT
