"""The network of a front: it runs at a point, and is checked when read."""

import jax
import numpy as np
import pytest

from nemo_jax import InputError, quantize
from nemo_jax.runs.front import Front
from nemo_jax.runs.model import Model, network_of
from tests import tiny
from tests.runs import fronts

VARIABLES = tiny.variables()
INPUTS, _ = tiny.examples(40)


@pytest.fixture(scope='module')
def quantized():
  return quantize(
    tiny.apply,
    VARIABLES,
    INPUTS,
    calibration='min_max',
    lowering='backend',
  )


@pytest.fixture(scope='module')
def front(quantized):
  """A front whose points are of 2 bits, of 8, and of 2 to 16."""
  rows = (2, 2, 2, 2), (8, 8, 8, 8), (2, 4, 8, 16)
  return fronts.toy(
    quantizers=tuple(q.name for q in quantized.quantizers),
    is_weight=tuple(q.is_weight for q in quantized.quantizers),
    bit_widths=(2, 4, 8, 16),
    points=tuple(fronts.point(0.1, 0.2, bits=row) for row in rows),
    uniform=(),
    network=network_of(quantized, VARIABLES, INPUTS, 'symmetric'),
    model=Model(quantized, VARIABLES),
  )


@pytest.fixture
def folder(front, tmp_path):
  """Where the front was saved."""
  front.save(tmp_path)
  return tmp_path


def test_a_point_is_the_network_at_its_bits(front, quantized):
  plain = tiny.apply(VARIABLES, INPUTS)
  errors = []
  for index, point in enumerate(front.points):
    bits = np.asarray(point.bits, np.int32)
    # A promise on the bits takes other programs, equal but for rounding.
    narrow = 8 if bits.max() <= 8 else None
    run = jax.jit(quantized.apply, static_argnames='max_bits')
    expected = run(VARIABLES, INPUTS, bits, max_bits=narrow)
    found = front.apply(index)(INPUTS)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(found, front.apply(point)(INPUTS))
    errors.append(float(np.mean(np.square(found - plain))))
  assert errors[1] < errors[2] < errors[0]
  last = front.apply(-1)(INPUTS[:3])
  np.testing.assert_allclose(last, found[:3], rtol=1e-6, atol=1e-6)


def test_what_was_saved_runs_as_before(front, folder):
  loaded = Front.load(folder, tiny.apply, VARIABLES)
  assert loaded == front
  for point in front.points:
    np.testing.assert_array_equal(
      loaded.apply(point)(INPUTS), front.apply(point)(INPUTS)
    )


def test_a_point_that_is_none_of_the_network_is_refused(front):
  with pytest.raises(InputError, match='point 3: the front has 3'):
    front.apply(3)
  with pytest.raises(InputError, match='point -4: the front has 3'):
    front.apply(-4)
  with pytest.raises(InputError, match='there are 4 quantizers'):
    front.apply(front.float_point)


def test_without_its_network_a_front_does_not_run(folder):
  with pytest.raises(InputError, match='no network; give Front.load the fun'):
    Front.load(folder).apply(0)


def refused(folder, words, apply=tiny.apply, variables=VARIABLES):
  with pytest.raises(InputError, match=words) as caught:
    Front.load(folder, apply, variables)
  assert str(folder) in str(caught.value)
  assert '\n' not in str(caught.value)


def test_other_weights_are_refused(folder):
  changed = VARIABLES | {'out': VARIABLES['out'] * 1.001}
  refused(folder, 'is a front of other weights than these', variables=changed)


def test_another_network_is_refused(folder):
  refused(folder, 'is a front of another network than this', apply=tiny.other)


def test_a_front_of_an_older_version_has_no_network(folder):
  fronts.toy().save(folder)
  refused(folder, 'a front of an older version, without its network')


@pytest.mark.parametrize(
  'key', ['weights', 'bank', 'inputs', 'extra_ops', 'weight_scheme', 'lowering']
)
def test_a_network_that_is_half_described_is_refused(front, folder, key):
  half = {k: v for k, v in front.network.items() if k != key}
  fronts.write(folder, network=half)
  refused(folder, f'network.{key} is missing')


def test_a_damaged_bank_is_refused(folder):
  path = folder / 'bank.npz'
  content = path.read_bytes()
  path.write_bytes(content[: len(content) // 2])
  refused(folder, 'bank.npz is damaged')
  hurt = bytearray(content)
  # In the numbers of the first array, behind its head.
  hurt[content.index(b'NUMPY') + 130] ^= 1
  path.write_bytes(hurt)
  refused(folder, 'bank.npz is damaged')
  path.unlink()
  refused(folder, 'cannot use .*bank.npz: No such file')


def test_the_bank_of_another_front_is_refused(folder):
  other = quantize(tiny.apply, VARIABLES, INPUTS, calibration='percentile')
  fronts.toy(model=Model(other, VARIABLES)).save(folder / 'other')
  (folder / 'other' / 'bank.npz').replace(folder / 'bank.npz')
  refused(folder, r'bank\.npz is of another front')


def test_saved_with_its_network_it_keeps_what_reconstruction_found(tmp_path):
  """Codes, and equalizers between the layers, are part of the bank."""
  from nemo_jax.quantization.ptq import reconstruct

  plain = quantize(tiny.apply, VARIABLES, INPUTS, calibration='min_max')
  found = reconstruct.reconstruct(plain, VARIABLES, INPUTS, chunk=16)
  assert found.bank.codes
  front = fronts.toy(
    quantizers=tuple(q.name for q in found.quantizers),
    is_weight=(),
    uniform=(),
    points=(fronts.point(0.1, 0.2, bits=(3,) * 4),),
    network=network_of(found, VARIABLES, INPUTS, 'symmetric'),
    model=Model(found, VARIABLES),
  )
  front.save(tmp_path)
  loaded = Front.load(tmp_path, tiny.apply, VARIABLES)
  expected = front.apply(0)(INPUTS)
  np.testing.assert_array_equal(loaded.apply(0)(INPUTS), expected)
  bits = np.full(4, 3, np.int32)
  assert np.any(np.asarray(plain.apply(VARIABLES, INPUTS, bits)) != expected)
