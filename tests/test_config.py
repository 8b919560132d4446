"""A config refuses each field that cannot be used by its name."""

import dataclasses
import math

import pytest

from nemo_jax import InputError
from nemo_jax.config import Config, FieldError
from nemo_jax.search import species

# By field, what cannot be used and what is said of it.
QUANTIZATION = [
  ('calibration', 'median', "'median'; the choices are least_squares, min_max"),
  (
    'reconstruct',
    ('bias', 'sparkle'),
    "'sparkle'; the choices are equalization",
  ),
  ('weight_scheme', 'skewed', "'skewed'; the choices are symmetric, asymmetr"),
  ('extra_ops', ('add', 'mul'), "'mul'; the choices are add, pool"),
  ('lowering', 'fast', "'fast'; the choices are traced, backend"),
  ('sensitivities', 'felt', "'felt'; the choices are none, second_order"),
  ('memory_gib', 0.0, '0.0 is no memory'),
  ('memory_gib', math.nan, 'nan is no memory'),
  ('memory_gib', math.inf, 'inf is no memory'),
]
SEARCH = [
  ('bit_widths', (8, 4), r'\[8, 4\]; give two or more whole numbers'),
  ('bit_widths', (1, 4), 'from 2 to 16'),
  ('bit_widths', (4,), 'two or more'),
  ('objectives', ('speed', 'size'), "'speed'; the choices are top1_error"),
  ('objectives', ('top1_error',), 'give two or more, each once'),
  ('objectives', ('top1_error', 'size', 'size'), 'each once'),
  ('objectives', ('size', 'top1_error'), "first objective is 'size'; the ch"),
  ('species', ('ants',), "unknown species 'ants'; the choices are boltzmann"),
  ('species', ('direct', 'direct'), 'give each once'),
  ('species', ('gcn:Adam',), "unknown algorithm 'Adam'; the choices are"),
  ('species', ('direct:SNES',), 'no choice of algorithm'),
  ('species', (), 'there are no species'),
  ('population', 7, 'a population of 7 is too small for 4 species'),
  ('population', 0, 'give a whole number from 1'),
  ('population', 60.0, 'give a whole number from 1'),
  ('evaluations', 59, '59 are less than one generation of 60'),
  ('evaluations', 0, 'give a whole number from 1'),
  ('evaluations', '60', 'give a whole number from 1'),
  ('seed', -1, 'give a whole number from 0'),
  ('seed', 2**32, 'is beyond 4294967295'),
  ('batch_size', 0, 'give a whole number from 1'),
  ('exploration', -0.5, 'exploration is -0.5; give 0 or more'),
  ('exploration', math.nan, 'exploration is nan; give 0 or more'),
  ('image_devices', 1009, 'has to divide the'),
  ('image_devices', 0, 'has to divide the'),
]


def check(config: Config) -> None:
  config.check_quantization()
  config.check_search()


@pytest.mark.parametrize(('field', 'value', 'words'), [*QUANTIZATION, *SEARCH])
def test_what_cannot_be_used_is_refused_by_its_name(field, value, words):
  with pytest.raises(FieldError, match=words) as caught:
    check(Config(**{field: value}))
  assert isinstance(caught.value, InputError)
  assert caught.value.field == field
  assert str(caught.value) == f'{field}: {caught.value.reason}'
  assert '\n' not in str(caught.value)


def test_every_field_that_can_be_wrong_is_checked():
  checked = {field for field, *_ in (*QUANTIZATION, *SEARCH)}
  fields = {field.name for field in dataclasses.fields(Config)}
  assert fields - checked == {'data_flow'}


@pytest.mark.parametrize(
  'changes',
  [
    {},
    {'reconstruct': ()},
    {'extra_ops': ('pool', 'add'), 'weight_scheme': 'asymmetric'},
    {'objectives': ('divergence', 'size')},
    {'bit_widths': (2, 16), 'memory_gib': 0.5},
    {'species': ('direct', 'gcn:SNES'), 'sensitivities': 'none'},
    {'species': ('paper',), 'objectives': ('top1_error', 'divergence')},
    {'population': 8, 'evaluations': 8, 'seed': 2**32 - 1, 'batch_size': 3},
    {'exploration': math.inf},
  ],
)
def test_what_can_be_used_is_not_refused(changes):
  check(Config(**changes))


@pytest.mark.parametrize(
  'changes',
  [
    {'sensitivities': 'none'},
    {'objectives': ('top1_error', 'divergence')},
  ],
)
def test_a_species_says_what_it_needs(changes):
  with pytest.raises(FieldError, match="'lagrangian' needs sensitivities and"):
    check(Config(**changes))
  check(Config(**changes, species=('direct',)))


def test_the_paper_is_without_what_the_team_needs():
  with pytest.raises(FieldError, match="which 'lagrangian' needs; name spe"):
    check(Config(species=('paper', 'lagrangian')))


def test_generations_are_whole_ones_within_the_budget():
  assert Config().generations == 30
  assert Config(evaluations=179, population=60).generations == 2


def test_the_team_is_of_the_words_in_their_order():
  assert tuple(Config().team()) == species.NEMO
  team = Config(species=('gcn:SNES', 'direct')).team()
  assert list(team) == ['gcn:SNES', 'direct']


def test_settings_say_what_a_run_is_and_not_where_it_is():
  settings = Config(memory_gib=3.0, image_devices=1).settings()
  fields = {field.name for field in dataclasses.fields(Config)}
  assert set(settings) == fields - {'memory_gib', 'image_devices'}
  # What JSON gives back is equal.
  assert not any(isinstance(value, tuple) for value in settings.values())
  assert settings['objectives'] == ['top1_error', 'size', 'bit_operations']
