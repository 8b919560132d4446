"""Pictures of a run."""

import dataclasses

import matplotlib.image
import numpy as np
import pytest

from nemo_jax.runs import plots
from nemo_jax.runs.front import choose_points
from tests.runs import fronts

FRONT = fronts.toy()
METRICS = [
  {
    'generation': g,
    'utility': [0.3 / g, None],
    'allocation': [4, 4],
    'front_share': [0.5, 0.5],
    'hypervolume': 0.1 * g,
  }
  for g in (1, 2, 3)
]


def dots(figure) -> list[int]:
  """How many dots each panel has."""
  return [
    sum(len(c.get_offsets()) for c in axes.collections) for axes in figure.axes
  ]


def test_pictures_show_something(tmp_path):
  chosen = choose_points(FRONT, (8, 4, 2))
  paths = [
    plots.plot_front(tmp_path, FRONT),
    plots.plot_projections(tmp_path, FRONT),
    plots.plot_species(tmp_path, FRONT, METRICS),
    plots.plot_bits(tmp_path, FRONT, chosen),
  ]
  for path in paths:
    pixels = matplotlib.image.imread(path)
    assert min(pixels.shape[:2]) > 200
    assert np.std(pixels[..., :3]) > 0.05, path


def test_two_objectives_have_pictures_too(tmp_path):
  front = fronts.of_two_objectives(fronts.toy(uniform_hypervolume=None))
  assert plots.plot_front(tmp_path, front) is None
  assert plots.plot_projections(tmp_path, front).exists()
  lines = [{k: v for k, v in m.items() if k != 'hypervolume'} for m in METRICS]
  assert plots.plot_species(tmp_path, front, lines).exists()


def test_a_front_is_drawn_with_every_point_in_every_panel():
  figure = FRONT.plot()
  assert dots(figure) == [3, 3]
  (axes, _) = figure.axes
  named = [text.get_text() for text in axes.get_legend().get_texts()]
  assert named == ['direct', 'gcn', 'uniform', 'float']
  assert axes.get_ylabel() == 'top-1 error'
  assert axes.get_xlabel() == 'model size / float'


@pytest.mark.parametrize(
  ('changes', 'count'),
  [
    ({'points': ()}, 0),
    ({'uniform': (), 'float_point': None}, 3),
    ({'species': ()}, 3),
    (
      {
        'species': (),
        'points': [dataclasses.replace(p, species=None) for p in FRONT.points],
      },
      3,
    ),
  ],
)
def test_what_a_front_lacks_is_not_drawn(changes, count):
  """Older files lack some of it."""
  figure = fronts.toy(**changes).plot()
  assert dots(figure) == [count, count]


def test_pictures_that_fail_are_one_warning(tmp_path):
  broken = [{'generation': 1}, *METRICS]
  (tmp_path / 'front_projections.png').mkdir()
  with pytest.warns(UserWarning, match='pictures are left out') as said:
    paths = plots.draw(
      [
        (plots.plot_front, tmp_path, FRONT),
        (plots.plot_projections, tmp_path, FRONT),
        (plots.plot_species, tmp_path, FRONT, broken),
        (plots.plot_bits, tmp_path, fronts.toy(bit_widths=()), {}),
      ]
    )
  assert [p.name for p in paths] == ['front_3d.png', 'species.png']
  (warning,) = said
  text = str(warning.message)
  assert text.startswith('pictures are left out: plot_projections (cannot use')
  assert 'plot_bits (' in text
  assert len(text.splitlines()) == 1
  left = {p.name for p in tmp_path.iterdir()}
  assert left == {'front_3d.png', 'species.png', 'front_projections.png'}


@pytest.mark.parametrize(
  'line',
  [
    {},
    {'utilitx': [0.1, 0.2]},
    {'utility': 'x', 'allocation': {}, 'hypervolume': [1, 2]},
    {'utility': [[1]], 'front_share': [1, 2, 3], 'hypervolume': {}},
    {'utility': [None, None], 'allocation': None, 'hypervolume': None},
  ],
)
def test_species_are_drawn_whatever_lines_hold(tmp_path, line):
  lines = [*METRICS, {'generation': 4} | line]
  assert plots.plot_species(tmp_path, FRONT, lines).exists()


def test_species_are_drawn_of_no_lines(tmp_path):
  assert plots.plot_species(tmp_path, FRONT, []).exists()
