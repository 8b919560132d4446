"""Tables of a run."""

import dataclasses

from nemo_jax.runs import tables
from nemo_jax.runs.front import choose_points
from tests.runs import fronts

FRONT = fronts.toy()


def test_chosen_points_are_the_cheapest_that_perform_no_worse():
  chosen = choose_points(FRONT, (8, 4, 2))
  assert {width: p.objectives[0] for width, p in chosen.items()} == {
    8: 0.1,
    4: 0.15,
    2: 0.15,
  }


def test_a_width_that_nothing_matches_is_left_out():
  front = dataclasses.replace(FRONT, points=FRONT.points[2:])
  assert list(choose_points(front, (8, 6, 4))) == [4]
  assert choose_points(fronts.empty(), (8, 6, 4)) == {}


def test_the_table_puts_the_same_bits_everywhere_beside_what_was_found():
  text = tables.table(FRONT, choose_points(FRONT, (8, 4, 2)))
  rows = [line.split('  ')[0] for line in text.splitlines()[2:]]
  assert rows == [
    'float',
    'uniform 8-bit',
    'as good as 8-bit',
    'uniform 4-bit',
    'as good as 4-bit',
    'uniform 2-bit',
    'as good as 2-bit',
  ]
  assert '90.00 %' in text
  assert 'model size / float' in text


def test_the_table_has_no_accuracy_where_none_was_measured():
  unscored = lambda p: dataclasses.replace(p, test_accuracy=None)
  front = fronts.toy(
    points=tuple(map(unscored, FRONT.points)),
    uniform=tuple(map(unscored, FRONT.uniform)),
    float_point=unscored(FRONT.float_point),
  )
  text = tables.table(front, choose_points(front, (8,)))
  assert '%' not in text
  assert 'test accuracy' not in text
  assert 'as good as 8-bit' in text


def test_the_table_has_a_dash_where_an_objective_is_not_finite():
  (first, *rest) = FRONT.uniform
  sick = dataclasses.replace(first, objectives=(None, 0.1, 0.1))
  text = tables.table(fronts.toy(uniform=(sick, *rest)), {})
  (line,) = [x for x in text.splitlines() if x.startswith('uniform 2-bit')]
  assert line.split()[2] == '-'


def test_cells_are_under_each_other():
  lines = tables.columns([('', 'a', 'bcd'), ('name', '1.5', '')])
  assert lines == ['        a  bcd', 'name  1.5']
