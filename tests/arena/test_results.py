"""Tables and pictures of methods side by side."""

import matplotlib.image
import numpy as np

from nemo_jax.arena import plots, statistics, tables

METHODS = ['nemo', 'uniform']
SEEDS = ['0', '1']


def cell(ahead, seed):
  volume = 0.5 + 0.1 * ahead + 0.01 * seed
  return {
    'curve': [[0, 0.0], [20, volume / 2], [40, volume]],
    'front': [[0.5 - 0.1 * ahead, 0.2, 0.1], [0.1, 0.5 - 0.01 * seed, 0.3]],
    'volumes': {
      '20': {'search': volume / 2},
      '40': {'search': volume, 'unseen': volume - 0.02},
    },
  }


RESULTS = {
  method: {seed: cell(1 - i, int(seed)) for seed in SEEDS}
  for i, method in enumerate(METHODS)
}


def test_there_is_a_table_for_each_score():
  text = tables.table(statistics.summarise(RESULTS, METHODS, SEEDS))
  search, unseen = text.strip().split('\n\n')
  assert search.splitlines()[0] == '| search | 20 | 40 |'
  assert unseen.splitlines()[0] == '| unseen | 40 |'
  first, second = search.splitlines()[2:]
  assert first.startswith('| nemo | 0.3025 ± ')
  assert '(' not in first
  assert second.endswith(' (2 of 2) |')


def test_pictures_show_something(tmp_path):
  paths = plots.plot_compare(
    tmp_path, RESULTS, METHODS, ['divergence', 'size', 'bit_operations']
  )
  assert [path.name for path in paths] == ['curves.png', 'attainment.png']
  for path in paths:
    pixels = matplotlib.image.imread(path)
    assert min(pixels.shape[:2]) > 200
    assert np.std(pixels[..., :3]) > 0.05, path


def test_a_method_that_found_nothing_is_no_error(tmp_path):
  results = {m: {'0': cell(0, 0) | {'front': []}} for m in METHODS}
  names = ['divergence', 'size', 'bit_operations']
  paths = plots.plot_compare(tmp_path, results, METHODS, names)
  assert len(paths) == 2
