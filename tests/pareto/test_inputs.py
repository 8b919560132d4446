"""Pareto primitives of whole numbers, other types, and ends of their range."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemo_jax import pareto
from nemo_jax.core.types import InputError

ROWS = np.array([[0, 3], [1, 1], [3, 0], [2, 2], [1, 1]])
DIRECTIONS = pareto.reference_directions(2, 3)
KEY = jax.random.key(0)
volume = jax.jit(pareto.hypervolume)

FUNCTIONS = {
  'nondominated_rank': pareto.nondominated_rank,
  'duplicated': pareto.duplicated,
  'crowding_distance': lambda x: pareto.crowding_distance(x),
  'hypervolume': lambda x: pareto.hypervolume(x, [4.5, 4.5]),
  'reference': lambda x: pareto.hypervolume([[0.5, 0.25]], x[3]),
  'r2': lambda x: pareto.r2(x, DIRECTIONS, [0, 0]),
  'hyperplane_normalize': lambda x: pareto.hyperplane_normalize(
    x, np.zeros(len(x), np.int8)
  ),
  'associate': lambda x: pareto.associate(x, DIRECTIONS),
  'nsga3_order': lambda x: pareto.nsga3_order(KEY, x, DIRECTIONS),
  'dominates': lambda x: pareto.dominates(x, x[::-1]),
}
TYPES = [
  bool,
  np.int8,
  np.uint8,
  np.int16,
  np.uint16,
  np.int64,
  np.uint32,
  np.float16,
  jnp.bfloat16,
  np.float64,
  jnp.int4,
  jnp.float8_e4m3fn,
  list,
]


@pytest.mark.parametrize('name', FUNCTIONS)
@pytest.mark.parametrize('dtype', TYPES, ids=lambda t: np.dtype(t).name)
def test_every_type_means_its_numbers(name, dtype):
  rows = ROWS > 0 if dtype is bool else ROWS
  expected = FUNCTIONS[name](np.asarray(rows, np.float32))
  given = rows.tolist() if dtype is list else np.asarray(rows, dtype)
  jax.tree.map(np.testing.assert_array_equal, FUNCTIONS[name](given), expected)


def test_a_fractional_reference_of_whole_numbers():
  rows = jnp.array([[0, 1], [1, 0]])
  for transformed in (pareto.hypervolume, volume):
    assert transformed(rows, jnp.array([1.5, 1.5])) == 1.25
  batch = jax.vmap(pareto.hypervolume, (0, None))(
    jnp.stack([rows, rows]), jnp.array([1.5, 1.5])
  )
  np.testing.assert_array_equal(batch, [1.25, 1.25])


def test_whole_numbers_beyond_32_bits_do_not_wrap():
  rows = np.array([[3_000_000_000, 1], [1, 3_000_000_000]])
  # Two boxes of 1e9 x (4e9 - 1), less what they share.
  found = pareto.hypervolume(rows, [4e9, 4e9])
  assert found == pytest.approx(7e18, rel=1e-6)
  np.testing.assert_array_equal(pareto.nondominated_rank(rows + [[0, 1]]), 0)


def test_ranks_of_whole_numbers_are_exact():
  rows = np.array([[2**24 + 1, 0], [2**24, 0]], np.int32)
  np.testing.assert_array_equal(pareto.nondominated_rank(rows), [1, 0])
  short = np.array([[-300, 0], [-301, 0], [300, 0]], np.int16)
  np.testing.assert_array_equal(pareto.nondominated_rank(short), [1, 0, 2])


X = np.linspace(0, 1, 10).reshape(5, 2)
REFUSED = {
  'one axis': lambda: pareto.nondominated_rank([1, 2, 3]),
  'no axis': lambda: pareto.hypervolume(3.0, [1, 1]),
  'three axes': lambda: pareto.crowding_distance(np.zeros((2, 3, 2))),
  'words': lambda: pareto.hypervolume([['a', 'b']], [1, 1]),
  'nothing': lambda: pareto.hypervolume(None, [1, 1]),
  'ragged': lambda: pareto.hypervolume([[1, 2], [1]], [1, 1]),
  'complex': lambda: pareto.hypervolume(X + 0j, [1, 1]),
  'no column': lambda: pareto.nondominated_rank(np.zeros((5, 0))),
  'long reference': lambda: pareto.hypervolume(X, [1, 1, 1]),
  'lone reference': lambda: pareto.hypervolume(X, 1.0),
  'nan reference': lambda: pareto.hypervolume(X, [1, np.nan]),
  'mask of places': lambda: pareto.nondominated_rank(X, np.arange(5)),
  'mask of floats': lambda: pareto.duplicated(X, np.ones(5)),
  'short mask': lambda: pareto.hypervolume(X, [1, 1], np.ones(4, bool)),
  'wide mask': lambda: pareto.crowding_distance(X, None, X > 0),
  'ranks of floats': lambda: pareto.crowding_distance(X, np.zeros(5)),
  'few ranks': lambda: pareto.hyperplane_normalize(X, np.zeros(4, int)),
  'wide directions': lambda: pareto.associate(
    X, pareto.reference_directions(3, 3)
  ),
  'zero direction': lambda: pareto.nsga3_order(KEY, X, np.zeros((4, 2))),
  'negative direction': lambda: pareto.nsga3_order(KEY, X, -DIRECTIONS),
  'no direction': lambda: pareto.nsga3_order(KEY, X, np.zeros((0, 2))),
  'one weight': lambda: pareto.r2(X, [1, 1], [0, 0]),
  'nan ideal': lambda: pareto.r2(X, DIRECTIONS, [0, np.nan]),
  'no partition': lambda: pareto.reference_directions(3, 0),
  'part of a partition': lambda: pareto.reference_directions(3, 2.5),
  'other columns': lambda: pareto.dominates([1, 2], [1, 2, 3]),
  'niches of floats': lambda: pareto.niching_order(
    KEY, np.zeros(4, int), np.zeros(4), np.zeros(4)
  ),
  'no block': lambda: pareto.nondominated_rank(X, None, 0),
  'key of floats': lambda: pareto.order(np.zeros(4), 5),
}


@pytest.mark.parametrize('name', REFUSED)
def test_what_is_no_set_is_refused_in_one_line(name):
  with pytest.raises(InputError) as caught:
    REFUSED[name]()
  assert '\n' not in str(caught.value)


def test_shapes_are_refused_while_they_are_traced():
  with pytest.raises(
    InputError, match=r'mask: the shape is \(4,\); give \[5\]'
  ):
    jax.eval_shape(pareto.nondominated_rank, X, np.ones(4, bool))


@pytest.mark.parametrize('name', [n for n in FUNCTIONS if n != 'reference'])
def test_of_an_empty_set_there_is_nothing(name):
  found = FUNCTIONS[name](np.zeros((0, 2)))
  for leaf in jax.tree.leaves(found):
    assert leaf.shape in ((), (0,), (0, 2))


# The ends of the range.


def exact(points, reference) -> Fraction:
  """The volume of points [n, M], by slices of the last objective."""
  points = [[Fraction(float(x)) for x in row] for row in points]
  reference = [Fraction(float(x)) for x in reference]

  def slices(rows, m):
    if not rows:
      return Fraction(0)
    ends = sorted({row[m - 1] for row in rows}) + [reference[m - 1]]
    if m == 1:
      return ends[-1] - ends[0]
    return sum(
      (high - low) * slices([r for r in rows if r[m - 1] <= low], m - 1)
      for low, high in zip(ends, ends[1:], strict=False)
    )

  inside = [
    row
    for row in points
    if all(x < y for x, y in zip(row, reference, strict=True))
  ]
  return slices(inside, len(reference))


LEAST = Fraction(float(np.finfo(np.float32).tiny))
MOST = Fraction(float(np.finfo(np.float32).max))


@pytest.mark.parametrize('m', [2, 3])
@pytest.mark.parametrize('shared', [False, True])
def test_hypervolume_is_right_wherever_it_is_a_float32(m, shared):
  """Depths of any size; those of an axis alike, or each of its own."""
  rng, finite = np.random.default_rng(m), 0
  for _ in range(150):
    power = rng.integers(-100, 110, (m,) if shared else (5, m))
    depth = np.ldexp(rng.uniform(0.5, 1.5, (5, m)), power)
    reference = np.zeros(m)
    if rng.random() < 0.3:
      reference = np.ldexp(1.0, rng.integers(-100, 110, m))
    points = (reference - depth).astype(np.float32)
    found = float(volume(points, reference.astype(np.float32)))
    truth = exact(points, reference.astype(np.float32))
    if truth > MOST:
      assert found == np.inf
    elif truth < 2 * LEAST:
      assert 0 <= found <= 4 * float(LEAST)
    else:
      finite += 1
      assert found == pytest.approx(float(truth), rel=1e-5)
  assert finite > 30


@pytest.mark.parametrize(
  ('points', 'reference', 'expected'),
  [
    ([[1e30, 1e30]], [2e30, 2e30], np.inf),
    ([[-3e38, 0]], [3e38, 1e-5], 6e33),
    ([[0, 0, 0]], [1e30, 1e30, 1e-30], 1e30),
    ([[0, 0, 0]], [1e-30, 1e-30, 1e30], 1e-30),
    ([[-1e30, -1e-30], [-1e-30, -1e30]], [0, 0], 2),
    ([[1e-30] * 3], [2e-30] * 3, 0),
    ([[-np.inf, 0]], [1, 1], np.inf),
    ([[-np.inf, 1]], [1, 1], 0),
    ([[0, 0]], [np.inf, 1], np.inf),
    ([[0, 2]], [np.inf, 1], 0),
    ([[0, 0]], [-np.inf, 1], 0),
    ([[1 - 2**-24, 0]], [1, 1], 2**-24),
  ],
)
def test_hypervolume_at_the_ends_of_float32(points, reference, expected):
  found = volume(np.array(points, np.float32), np.array(reference, np.float32))
  assert float(found) == pytest.approx(expected, rel=1e-6)


def test_scaling_keeps_every_bit():
  rng = np.random.default_rng(0)
  points = rng.random((64, 3)).astype(np.float32)
  plain = volume(points, np.ones(3, np.float32))
  for powers in ([40, 40, 40], [-40, -40, -40], [90, -60, 10], [-90, 100, 1]):
    units = np.ldexp(np.float32(1), powers)
    found = volume(points * units, units)
    assert float(found) == float(plain) * 2.0 ** sum(powers)


def test_whole_numbers_that_no_type_holds_together_are_refused():
  large = np.asarray([3_000_000_000], np.uint32)
  with pytest.raises(InputError, match='uint32 and int32; give them one type'):
    pareto.dominates(large, np.asarray([1], np.int32))
  assert not pareto.dominates(large, np.asarray([1], np.uint32))


@pytest.mark.parametrize('scale', [1e-30, 1e-3, 1.0, 1e30])
def test_directions_count_by_their_direction_alone(scale):
  rows = np.asarray([[1, 0], [0, 1], [0.3, 0.7]], np.float32)
  directions = np.asarray([[0, 1], [1, 0], [1, 1]], np.float32)
  expected = pareto.associate(rows, directions)
  found = pareto.associate(rows, directions * np.float32(scale))
  np.testing.assert_array_equal(found[0], expected[0])
  np.testing.assert_allclose(found[1], expected[1], atol=1e-6)
