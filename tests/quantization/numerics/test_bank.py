"""Files of banks: what fits is read as it was, the rest is refused by name."""

import jax
import numpy as np
import pytest

from nemo_jax import InputError
from nemo_jax.core import files
from nemo_jax.quantization.numerics import bank
from nemo_jax.quantization.numerics.ranges import Range
from nemo_jax.quantization.numerics.widths import CODED, WIDTHS
from nemo_jax.quantization.trace.analysis import Site

SITE = Site(*range(len(Site._fields)))
ROWS = len(CODED)


def example() -> bank.Bank:
  draw = np.random.default_rng(0)
  row = (len(WIDTHS), 4)
  ranges = tuple(
    Range(
      draw.uniform(0.1, 1, row).astype(np.float32), np.zeros(row, np.float32)
    )
    for _ in range(12)
  )
  codes = draw.integers(-128, 128, (ROWS, 3, 4)).astype(np.int8)
  ones = np.ones((ROWS, 4), np.float32)
  return bank.Bank(ranges, {SITE: codes}, {SITE: ones}, {SITE: ones[0]})


def test_a_bank_is_read_as_it_was_written(tmp_path):
  path = tmp_path / 'one.npz'
  bank.save(path, example())
  found = bank.load(path)
  jax.tree.map(np.testing.assert_array_equal, found, example())
  assert found.codes[SITE].dtype == np.int8
  bank.check_fits(found, example(), [SITE])


def site_column(field: str) -> str:
  (name,) = [n for n in bank.columns_of(example()) if n.startswith(field)]
  return name


CHANGES = {
  'unknown': ('biases/0', np.zeros(3), 'biases/0 is no column'),
  'no name': ('', np.zeros(3), 'no column'),
  'gap': ('ranges/20/scale', np.ones(3), 'ranges/20/scale is no column'),
  'no scale': ('ranges/3/scale', None, 'there is no ranges/3/scale'),
  'no zero': ('ranges/11/zero_point', None, 'no ranges/11/zero_point'),
  'column': ('ranges/3/mean', np.ones(3), 'ranges/3/mean is no column'),
  'double': ('ranges/3/scale', np.ones((15, 4)), 'is float64, not float32'),
  'rows': ('ranges/3/scale', np.ones((2, 4), np.float32), 'not 15 rows'),
  'scalar': ('ranges/3/scale', np.float32(1), r'shape \(\), not 15 rows'),
  'shape': ('ranges/3/scale', np.ones((15, 1), np.float32), 'ranges/3 has'),
  'zero': ('ranges/3/scale', np.zeros((15, 4), np.float32), 'not positive'),
  'negative': ('ranges/3/scale', -np.ones((15, 4), np.float32), 'not positive'),
  'nan': ('ranges/3/scale', np.full((15, 4), np.nan, np.float32), 'not finite'),
  'infinite': (
    'ranges/3/zero_point',
    np.full((15, 4), np.inf, np.float32),
    'not finite',
  ),
  'wide codes': (
    site_column('codes'),
    np.zeros((ROWS, 3, 4), np.int16),
    'is int16, not int8',
  ),
  'few codes': (
    site_column('codes'),
    np.zeros((2, 3, 4), np.int8),
    'not 7 rows',
  ),
  'text for a site': ('codes/x', np.zeros((ROWS, 3), np.int8), 'is of no site'),
  'half a site': ('codes/[1]', np.zeros((ROWS, 3), np.int8), 'is of no site'),
  'number for a site': ('codes/7', np.zeros((ROWS,), np.int8), 'of no site'),
}


@pytest.mark.parametrize(
  ('name', 'array', 'words'), CHANGES.values(), ids=CHANGES.keys()
)
def test_a_column_that_does_not_fit_is_named(tmp_path, name, array, words):
  assert len(WIDTHS) == 15
  assert ROWS == 7
  columns = bank.columns_of(example())
  if array is None:
    del columns[name]
  else:
    columns[name] = np.asarray(array)
  path = tmp_path / 'one.npz'
  files.write_arrays(path, columns)
  with pytest.raises(InputError, match=words) as raised:
    bank.load(path)
  assert 'one.npz' in str(raised.value)
  assert len(str(raised.value).splitlines()) == 1


def test_the_bank_of_another_network_does_not_fit():
  own = example()
  with pytest.raises(InputError, match='ranges are of another network'):
    bank.check_fits(own.replace(ranges=own.ranges[:-1]), own, [SITE])
  with pytest.raises(InputError, match='sites are those of another network'):
    bank.check_fits(own, own, [])
  with pytest.raises(InputError, match='sites are those of another network'):
    bank.check_fits(own.replace(shifts={}), own, [SITE])


def test_banks_do_not_share_what_they_were_not_given():
  one, other = bank.Bank(()), bank.Bank(())
  for field in ('codes', 'shifts', 'equalizers'):
    getattr(one, field)['site'] = 1
    assert getattr(other, field) == {}
    assert getattr(bank.Bank(()), field) == {}


def test_a_bank_is_a_tree_of_its_fields():
  one = bank.Bank((1.0,), codes={'a': 2.0})
  doubled = jax.tree.map(lambda x: 2 * x, one)
  assert doubled == bank.Bank((2.0,), {'a': 4.0}, {}, {})
  assert one.replace(codes={}) == bank.Bank((1.0,))


def test_codes_and_shifts_of_another_shape_do_not_fit():
  own = example()
  column = lambda x: x[:, None]
  own = own.replace(
    ranges=tuple(Range(*map(column, r)) for r in own.ranges),
    shifts={SITE: column(own.shifts[SITE])},
  )
  weights = {SITE: jax.ShapeDtypeStruct((3, 4), np.float32)}
  bank.check_fits(own, own, [SITE], weights)
  longer = {SITE: np.repeat(own.codes[SITE], 2, axis=1)}
  with pytest.raises(InputError, match='its codes of .* have shape'):
    bank.check_fits(own.replace(codes=longer), own, [SITE], weights)
  wider = {SITE: np.repeat(own.shifts[SITE], 2, axis=2)}
  with pytest.raises(InputError, match='its shifts of .* have shape'):
    bank.check_fits(own.replace(shifts=wider), own, [SITE], weights)
