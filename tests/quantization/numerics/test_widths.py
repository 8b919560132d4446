"""Which bit-widths there are, and the words for configurations of them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemo_jax.core.types import InputError
from nemo_jax.quantization.numerics import widths

IS_WEIGHT = [False, True, False, True, True]


def test_widths_go_from_two_to_sixteen_and_one_more_is_float():
  assert widths.WIDTHS == (2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16)
  assert widths.SWITCHED_OFF == 17
  assert widths.CODED == widths.DEFAULT == (2, 3, 4, 5, 6, 7, 8)


def test_every_choice_by_default_is_one():
  assert widths.check_choices(widths.DEFAULT) == widths.DEFAULT


# Words.


@pytest.mark.parametrize(
  ('word', 'expected'),
  [
    ('float', [17, 17, 17, 17, 17]),
    ('2', [2, 2, 2, 2, 2]),
    ('8', [8, 8, 8, 8, 8]),
    ('16', [16, 16, 16, 16, 16]),
    ('w4a8', [8, 4, 8, 4, 4]),
    ('w8a4', [4, 8, 4, 8, 8]),
    ('w16a2', [2, 16, 2, 16, 16]),
    ('w3a3', [3, 3, 3, 3, 3]),
  ],
)
def test_a_word_stands_for_the_bits_of_every_quantizer(word, expected):
  found = widths.from_word(word, IS_WEIGHT)
  assert found.dtype == np.int32
  np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize('word', ['float', '8', 'w4a8'])
def test_of_no_quantizers_a_word_stands_for_no_bits(word):
  assert widths.from_word(word, []).shape == (0,)


@pytest.mark.parametrize('bits', widths.WIDTHS)
def test_every_width_has_a_word(bits):
  found = widths.from_word(f'w{bits}a{18 - bits}', IS_WEIGHT)
  np.testing.assert_array_equal(found, np.where(IS_WEIGHT, bits, 18 - bits))


@pytest.mark.parametrize(
  'word',
  [
    '',
    '0',
    '1',
    '17',
    '32',
    '008',
    '-8',
    '+8',
    ' 8',
    '8 ',
    '8\n',
    '4.5',
    '8,8',
    'Float',
    'floats',
    'int8',
    'w4',
    'a8',
    'a8w4',
    'w4a',
    'wa',
    'w4a8w4',
    'W4A8',
    'w4 a8',
    'w1a8',
    'w4a17',
    'w4a32',
  ],
)
def test_a_word_that_is_no_configuration_is_refused(word):
  words = re.escape(f'{word!r} is no configuration; the choices are float, ')
  with pytest.raises(InputError, match=f'^{words}.*2 to 16.*w4a8$') as caught:
    widths.from_word(word, IS_WEIGHT)
  assert '\n' not in str(caught.value)


# Choices of a search.


@pytest.mark.parametrize(
  'choices',
  [(2, 8), (2, 16), [2, 3, 4], range(2, 17), np.asarray([4, 8])],
)
def test_ascending_widths_are_choices(choices):
  found = widths.check_choices(choices)
  assert isinstance(found, tuple)
  assert list(found) == [int(x) for x in choices]


@pytest.mark.parametrize(
  ('choices', 'words'),
  [
    ((8, 2), 'ascending'),
    ((2, 8, 4), 'ascending'),
    ((4, 4, 8), 'ascending'),
    ((1, 8), 'from 2 to 16'),
    ((0, 8), 'from 2 to 16'),
    ((-2, 8), 'from 2 to 16'),
    ((8, 17), 'from 2 to 16'),
    ((8, 32), 'from 2 to 16'),
    ((8,), 'two or more'),
    ((), 'two or more'),
    ((2.5, 4), 'whole numbers'),
    ((4, np.nan), 'whole numbers'),
    ('48', 'whole numbers'),
  ],
)
def test_choices_that_cannot_be_searched_are_refused(choices, words):
  listed = re.escape(f'bit-widths are {list(choices)}; ')
  with pytest.raises(InputError, match=f'^{listed}.*{words}'):
    widths.check_choices(choices)


# Bits of a configuration.


def test_bits_of_a_configuration_are_whole_numbers_of_32_bits():
  for bits in ([2, 8, 16], np.asarray([2, 8, 16], np.uint8), (2, 8, 16)):
    found = widths.check_bits(bits, 3)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, [2, 8, 16])


def test_one_more_than_any_width_stands_for_all_wider_ones():
  found = widths.check_bits([16, 17, 18, 32, 10**12], 5)
  np.testing.assert_array_equal(found, [16, 17, 17, 17, 17])
  np.testing.assert_array_equal(found[1:], widths.float_bits(4))


def test_bits_may_be_traced():
  run = jax.jit(lambda bits: widths.check_bits(bits, 2))
  assert run(np.asarray([4, 8], np.int8)).dtype == jnp.int32
  with pytest.raises(InputError, match=r'shape \(3,\); there are 2 quantizers'):
    run(np.asarray([4, 8, 8]))
  with pytest.raises(InputError, match='float32; give whole numbers'):
    run(np.asarray([4, 8], np.float32))


@pytest.mark.parametrize(
  ('bits', 'words'),
  [
    ([4, 1], 'quantizer 1 has 1 bits; they go from 2'),
    ([4, 8, 8], r'shape \(3,\); there are 2 quantizers'),
    ([4.0, 8.0], 'of type float64; give whole numbers'),
    ([True, False], 'of type bool'),
  ],
)
def test_bits_that_no_quantizer_has_are_refused(bits, words):
  with pytest.raises(InputError, match=words):
    widths.check_bits(bits, 2)
