"""The best point within limits, and what is said where there is none."""

import math
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_jax import InputError
from tests.runs import fronts

FRONT = fronts.toy()
PRECISE, MIDDLE, SMALL = FRONT.points  # 3.5, 3 and 1.5 MB


@pytest.mark.parametrize(
  ('limits', 'point'),
  [
    ({'max_size_mb': 9.0}, PRECISE),
    ({'max_size_mb': 3.2}, MIDDLE),
    ({'max_size_mb': 1.5}, SMALL),
    ({'max_gbitops': 30}, MIDDLE),
    ({'max_gbitops': 40, 'max_size_mb': 2}, SMALL),
    ({'min_performance': 0.5}, SMALL),
    ({'min_performance': 0.86}, MIDDLE),
    ({'min_performance': 0.91, 'max_size_mb': 9}, PRECISE),
    ({'min_performance': 0.86, 'max_gbitops': 36}, MIDDLE),
  ],
)
def test_the_best_within_limits_is_chosen(limits, point):
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    assert FRONT.select(**limits) == point


def test_a_limit_is_met_to_the_last_digit():
  for point in FRONT.points:
    assert FRONT.select(min_performance=1 - point.objectives[0]) == point
    assert FRONT.select(max_size_mb=point.size_mb) == point


def test_where_no_point_is_within_the_nearest_says_what_it_misses():
  with pytest.warns(UserWarning, match='no point is within') as said:
    point = FRONT.select(max_size_mb=1.2, min_performance=0.8)
  assert point.bits == SMALL.bits
  assert point.size_mb == 1.5
  assert point.shortfall == ('1.5 MB, not 1.2 (max_size_mb)',)
  (warning,) = said
  assert str(warning.message).endswith(point.shortfall[0])
  assert warning.filename == __file__
  with pytest.warns(UserWarning, match=' and 0.9 accuracy'):
    point = FRONT.select(max_size_mb=3, min_performance=0.95, max_gbitops=29)
  assert point.objectives == MIDDLE.objectives
  assert point.shortfall == (
    '30 G bit-operations, not 29 (max_gbitops)',
    '0.9 accuracy, not 0.95 (min_performance)',
  )


@pytest.mark.parametrize(
  ('front', 'limits', 'words'),
  [
    (FRONT, {}, 'give a limit: max_size_mb, max_gbitops or min_performance'),
    (fronts.empty(), {'max_size_mb': 1}, 'the front has no point'),
    (
      fronts.toy(points=(fronts.point(0.1, 0.2, size_mb=None),)),
      {'max_size_mb': 1},
      'no size_mb: it was written by an older version',
    ),
    (
      fronts.toy(points=(fronts.point(0.1, 0.2, gbitops=None),)),
      {'max_gbitops': 1},
      'no gbitops: it was written by an older version',
    ),
    # There is no telling which is the smallest.
    (
      fronts.toy(points=(fronts.point(0.1, 0.2, size_mb=None),)),
      {'min_performance': 0.5},
      'no size_mb',
    ),
    (FRONT, {'max_size_mb': math.nan}, 'max_size_mb is nan; give a number'),
    (FRONT, {'max_gbitops': -1}, 'max_gbitops is -1; give a number'),
    (FRONT, {'min_performance': 95}, 'min_performance is 95; .* from 0 to 1'),
    (
      fronts.toy(objective_names=('divergence', 'size', 'bit_operations')),
      {'min_performance': 0.5},
      'needs an error as first objective, .*; this front has divergence',
    ),
  ],
)
def test_what_cannot_be_asked_is_refused(front, limits, words):
  with pytest.raises(InputError, match=words) as caught:
    front.select(**limits)
  assert '\n' not in str(caught.value)


LIMIT = st.none() | st.sampled_from([0.05, 0.1, 0.25, 0.3, 0.5, 0.75, 1.0])


@given(
  st.integers(0, 1000), st.integers(1, 12), LIMIT, LIMIT, LIMIT | st.just(0.9)
)
def test_it_is_what_trying_all_points_finds(seed, count, size, work, least):
  front = fronts.random(seed, count)
  limits = {'max_size_mb': size, 'max_gbitops': work, 'min_performance': least}
  if all(limit is None for limit in limits.values()):
    return
  within = [
    p
    for p in front.points
    if (size is None or p.size_mb <= size)
    and (work is None or p.gbitops <= work)
    and (least is None or p.objectives[0] <= 1 - least + 1e-12)
  ]
  with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter('always')
    found = front.select(**limits)
  assert len(said) == (not within)
  assert bool(found.shortfall) == (not within)
  if within and least is not None:
    assert found in within
    assert found.size_mb == min(p.size_mb for p in within)
  elif within:
    assert found in within
    assert found.objectives[0] == min(p.objectives[0] for p in within)
  else:
    share = lambda p: (
      sum(
        max(0.0, (have - limit) / limit)
        for have, limit in ((p.size_mb, size), (p.gbitops, work))
        if limit is not None
      )
      + (max(0.0, p.objectives[0] - 1 + least) / least if least else 0)
    )
    best = min(map(share, front.points))
    assert share(found) == pytest.approx(best, abs=1e-9)
