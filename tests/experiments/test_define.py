"""Flags that refuse, when they are parsed, what cannot be used."""

import math
import pathlib
import subprocess
import sys

import pytest
from absl import flags
from hypothesis import given
from hypothesis import strategies as st

from experiments import define
from nemo_jax.core.types import InputError

FLAGS = flags.FLAGS
ROOT = pathlib.Path(__file__).parents[2]
DEFAULT = {
  'whole': 5,
  'number': 0.5,
  'unlimited': 0.5,
  'path': 'here',
  'plugin': 'one',
  'words': ['one'],
  'may_be_none': [],
  'numbers': ['2'],
}


@pytest.fixture(scope='module', autouse=True)
def defined():
  """A flag of each kind."""
  name = lambda kind: f'test_{kind}'
  define.whole(name('whole'), DEFAULT['whole'], '', 2, 99)
  define.number(name('number'), DEFAULT['number'], '', 0.01, 8)
  define.number(name('unlimited'), DEFAULT['unlimited'], '', 0, math.inf)
  define.path(name('path'), DEFAULT['path'], '')
  choices = {'choices': ('one', 'two'), 'of': 'word'}
  define.plugin(name('plugin'), DEFAULT['plugin'], '')
  define.words(name('words'), DEFAULT['words'], '', **choices)
  define.words(
    name('may_be_none'), DEFAULT['may_be_none'], '', may_be_empty=True
  )
  define.words(name('numbers'), DEFAULT['numbers'], '', numbers=(0, 99))
  yield
  for kind in DEFAULT:
    delattr(FLAGS, name(kind))


def parse(kind: str, text: str):
  FLAGS[f'test_{kind}'].parse(text)
  return FLAGS[f'test_{kind}'].value


@pytest.mark.parametrize('kind', DEFAULT)
def test_defaults_are_as_given(kind):
  FLAGS[f'test_{kind}'].unparse()
  assert FLAGS[f'test_{kind}'].value == DEFAULT[kind]


@pytest.mark.parametrize(
  ('kind', 'text', 'value'),
  [
    ('whole', '2', 2),
    ('whole', '99', 99),
    ('whole', '+7', 7),
    ('number', '0.01', 0.01),
    ('number', '8', 8.0),
    ('number', '1e-1', 0.1),
    ('unlimited', 'inf', math.inf),
    ('path', 'runs/a b/ü/', 'runs/a b/ü/'),
    ('path', 'tfds:imagenet2012', 'tfds:imagenet2012'),
    ('path', '~', str(pathlib.Path.home())),
    ('path', '~/a', str(pathlib.Path.home() / 'a')),
    ('path', 'a/~', 'a/~'),
    ('plugin', 'two', 'two'),
    ('plugin', 'a b/ü.py', 'a b/ü.py'),
    ('words', 'two, one', ['two', 'one']),
    ('may_be_none', '', []),
    ('may_be_none', 'x,w4a8', ['x', 'w4a8']),
    ('numbers', '0,10', ['0', '10']),
  ],
)
def test_what_can_be_used_is_read(kind, text, value):
  found = parse(kind, text)
  assert found == value
  assert type(found) is type(value)


@pytest.mark.parametrize(
  ('kind', 'text', 'words'),
  [
    *[
      ('whole', text, 'is no whole number from 2 to 99')
      for text in (
        *('', ' ', 'x', '1.5', '1e1', '0x10', '1_0', '２', '٣', '5\n'),
        *('nan', 'inf', '9' * 5000, '\udcff', '--5'),
      )
    ],
    *[('whole', text, 'from 2 to 99') for text in ('1', '-5', '100')],
    *[
      (kind, text, 'it has to be a number from')
      for kind in ('number', 'unlimited')
      for text in ('', 'x', 'nan', '-nan', '-1', '-inf', '２', '1,5', '\udcff')
    ],
    *[('number', text, 'from 0.01 to 8') for text in ('inf', '0', '8.001')],
    ('path', '', 'is empty'),
    ('path', 'a\nb', 'control characters'),
    ('path', 'a\0b', 'control characters'),
    ('path', 'gs://bucket/a', 'is a URL'),
    ('path', '~nobody-at-all/a', 'cannot expand'),
    ('path', 'a/' + 'x' * 256, 'over 255 bytes'),
    ('path', 'ü' * 128, 'over 255 bytes'),
    ('plugin', '', "'' is no name"),
    ('plugin', 'a\nb', 'is no name'),
    ('plugin', '\x1b[31m', 'is no name'),
    ('words', 'one,three', "unknown word 'three'; the choices are one, two"),
    ('words', '', 'there are no test_words'),
    ('words', 'one,', "'' is no word"),
    ('words', ',', "'' is no word"),
    ('words', 'one,one', 'give each once'),
    ('may_be_none', 'a,b\nc', 'is no word'),
    ('may_be_none', 'a,a', 'give each once'),
    ('numbers', '2,two', "'two' is no whole number from 0 to 99"),
    ('numbers', '100', 'from 0 to 99'),
    ('numbers', '２', "'２' is no whole number"),
    ('numbers', '2,02', "'02' is written 2"),
  ],
)
def test_what_cannot_be_used_is_refused(kind, text, words):
  with pytest.raises(flags.IllegalFlagValueError) as caught:
    parse(kind, text)
  assert words in str(caught.value)
  assert f'test_{kind}' in str(caught.value)


@given(
  st.sampled_from(list(DEFAULT)),
  st.text(max_size=20) | st.floats().map(str) | st.integers().map(str),
)
def test_any_text_is_read_or_refused(kind, text):
  try:
    value = parse(kind, text)
  except flags.IllegalFlagValueError:
    return
  if kind == 'whole':
    assert 2 <= value <= 99
  if kind in ('number', 'unlimited'):
    assert value >= 0
  if kind == 'words':
    assert set(value) <= {'one', 'two'}
    assert value
  if kind == 'numbers':
    assert [str(int(word)) for word in value] == value


def test_messages_name_the_flag():
  parse('words', 'two,one')
  with (
    pytest.raises(InputError, match=r'^--test_words=two,one: reason$'),
    define.named('test_words'),
  ):
    raise InputError('reason')


def test_flags_belong_to_the_module_that_defines_them():
  # In a process of its own: experiments have flags of the same names.
  code = (
    'from absl import flags; from experiments import define, transfer; '
    'of = lambda m: sorted(f.name for f in flags.FLAGS.get_flags_for_module(m))'
    '; print(of(transfer), of(define))'
  )
  shown = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT
  )
  names = ['budget', 'population', 'seeds', 'source_budget']
  assert shown.stdout == f'{names} []\n'
