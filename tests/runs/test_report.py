"""Tables and pictures of a run."""

import matplotlib.image
import numpy as np
import pytest

from nemo_jax.runs import report

WIDTHS = (2, 4, 8)


@pytest.fixture
def front():
  def point(error, size, **extra):
    return {
      'bits': [2, 4, 8],
      'objectives': [error, size, size / 4],
      'test_accuracy': 1 - error,
    } | extra

  uniform = [point(e, s) for e, s in ((0.9, 0.1), (0.2, 0.2), (0.1, 0.4))]
  for width, row in zip(WIDTHS, uniform, strict=True):
    row['bits'] = [width] * 3
  return {
    'workload': 'toy',
    'objective_names': ['top1_error', 'size', 'bit_operations'],
    'bit_widths': list(WIDTHS),
    'quantizers': ['a:input', 'a/kernel', 'b/kernel'],
    'is_weight': [False, True, True],
    'species': ['direct', 'gcn'],
    'float': {'objectives': [0.1, 1.0, 1.0], 'test_accuracy': 0.9},
    'uniform': uniform,
    'uniform_hypervolume': 0.3,
    'points': [
      point(0.08, 0.35, species='gcn'),
      point(0.1, 0.3, species='gcn'),
      point(0.15, 0.15, species='direct'),
    ],
  }


@pytest.fixture
def metrics():
  return [
    {
      'generation': g,
      'utility': [0.3 / g, None],
      'allocation': [4, 4],
      'front_share': [0.5, 0.5],
      'hypervolume': 0.1 * g,
    }
    for g in (1, 2, 3)
  ]


def test_chosen_points_are_the_cheapest_that_perform_no_worse(front):
  chosen = report.choose_points(front, (8, 4, 2))
  assert [(p['name'], p['objectives'][0]) for p in chosen] == [
    ('as good as 8-bit', 0.1),
    ('as good as 4-bit', 0.15),
    ('as good as 2-bit', 0.15),
  ]


def test_a_width_that_nothing_matches_is_left_out(front):
  front['points'] = front['points'][2:]
  names = [p['name'] for p in report.choose_points(front, (8, 6, 4))]
  assert names == ['as good as 4-bit']


def test_the_table_puts_rivals_beside_each_other(front):
  text = report.table(front, report.choose_points(front, (8, 4, 2)))
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


def test_pictures_show_something(front, metrics, tmp_path):
  chosen = report.choose_points(front, (8, 4, 2))
  paths = [
    report.plot_front(tmp_path, front),
    report.plot_projections(tmp_path, front),
    report.plot_species(tmp_path, front, metrics),
    report.plot_bits(tmp_path, front, chosen),
  ]
  for path in paths:
    pixels = matplotlib.image.imread(path)
    assert min(pixels.shape[:2]) > 200
    assert np.std(pixels[..., :3]) > 0.05, path


def test_two_objectives_have_pictures_too(front, metrics, tmp_path):
  front['objective_names'] = front['objective_names'][:2]
  for part in ('points', 'uniform'):
    for point in front[part]:
      point['objectives'] = point['objectives'][:2]
  assert report.plot_front(tmp_path, front) is None
  assert report.plot_projections(tmp_path, front).exists()
  for row in metrics:
    del row['hypervolume']
  front['uniform_hypervolume'] = None
  assert report.plot_species(tmp_path, front, metrics).exists()


def test_pictures_that_fail_are_one_warning(front, metrics, tmp_path):
  broken = [{'generation': 1}] + metrics
  (tmp_path / 'front_projections.png').mkdir()
  del front['quantizers']
  with pytest.warns(UserWarning, match='pictures are left out') as said:
    paths = report.draw(
      [
        (report.plot_front, tmp_path, front),
        (report.plot_projections, tmp_path, front),
        (report.plot_species, tmp_path, front, broken),
        (report.plot_bits, tmp_path, front, []),
      ]
    )
  assert [p.name for p in paths] == ['front_3d.png', 'species.png']
  (warning,) = said
  text = str(warning.message)
  assert text.startswith('pictures are left out: plot_projections (cannot use')
  assert "plot_bits ('quantizers')" in text
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
def test_species_are_drawn_whatever_lines_hold(front, metrics, tmp_path, line):
  lines = [*metrics, {'generation': 4} | line]
  assert report.plot_species(tmp_path, front, lines).exists()


def test_species_are_drawn_of_no_lines(front, tmp_path):
  assert report.plot_species(tmp_path, front, []).exists()
