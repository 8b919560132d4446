"""From a network to its problem: what is costly is made once, and checked."""

import jax
import numpy as np
import pytest

from nemo_jax import InputError, pipeline
from nemo_jax.config import Config
from nemo_jax.core import files
from nemo_jax.data.labelled import Images
from nemo_jax.quantization import sensitivity
from nemo_jax.quantization.ptq import reconstruct
from nemo_jax.workloads import Workload
from tests import tiny

WORKLOAD = Workload(
  name='tiny',
  apply=tiny.apply,
  variables=tiny.variables(),
  calibration=Images(*tiny.examples(20)),
  search=Images(*tiny.examples(30, seed=1)),
  test=Images(*tiny.examples(10, seed=2)),
)
CONFIG = Config(
  calibration='min_max',
  reconstruct=('bias',),
  sensitivities='first_order',
  bit_widths=(2, 4, 8),
)
PLAIN = Config(calibration='min_max', reconstruct=(), bit_widths=(2, 4, 8))


def replace(config: Config, **changes) -> Config:
  return Config(**vars(config) | changes)


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp('cache')


@pytest.fixture(scope='module')
def quantized(cache):
  return pipeline.quantize_network(WORKLOAD, CONFIG, cache)


def same(one, two):
  assert files.digest(one) == files.digest(two)


def test_a_reconstructed_bank_is_made_once(quantized, cache, monkeypatch):
  assert len(quantized.bank.codes) == 2
  monkeypatch.setattr(reconstruct, 'reconstruct', pytest.fail)
  again = pipeline.quantize_network(WORKLOAD, CONFIG, cache)
  same(again.bank, quantized.bank)
  # Nothing is kept of what takes no time.
  before = sorted(cache.rglob('*'))
  plain = pipeline.quantize_network(WORKLOAD, PLAIN, cache)
  assert not plain.bank.codes
  assert sorted(cache.rglob('*')) == before


def other_weights(workload):
  return workload._replace(
    variables=jax.tree.map(lambda x: 1.01 * x, workload.variables)
  )


@pytest.mark.parametrize(
  ('workload', 'config'),
  [
    (WORKLOAD, replace(CONFIG, calibration='percentile')),
    (WORKLOAD, replace(CONFIG, reconstruct=('rounding',))),
    (WORKLOAD._replace(calibration=WORKLOAD.search), CONFIG),
    (other_weights(WORKLOAD), CONFIG),
  ],
)
def test_what_decides_a_bank_names_it(
  quantized, cache, monkeypatch, workload, config
):
  del quantized  # of which the cache has the bank

  def make(*_, **__):
    raise RuntimeError('made')

  monkeypatch.setattr(reconstruct, 'reconstruct', make)
  with pytest.raises(RuntimeError, match='made'):
    pipeline.quantize_network(workload, config, cache)


def test_a_damaged_bank_is_made_again(quantized, tmp_path, cache):
  (bank,) = (cache / 'banks').iterdir()
  (tmp_path / 'banks').mkdir()
  (tmp_path / 'banks' / bank.name).write_bytes(bank.read_bytes()[:-50])
  with pytest.warns(UserWarning, match='damaged.*; it is made again'):
    again = pipeline.quantize_network(WORKLOAD, CONFIG, tmp_path)
  same(again.bank, quantized.bank)
  assert (tmp_path / 'banks' / bank.name).read_bytes() == bank.read_bytes()


def test_without_a_cache_nothing_is_written(quantized, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  again = pipeline.quantize_network(WORKLOAD, CONFIG, None)
  same(again.bank, quantized.bank)
  table = pipeline.find_sensitivities(WORKLOAD, again, CONFIG, None)
  assert table.shape == (4, 3)
  assert not list(tmp_path.iterdir())


def test_sensitivities_are_estimated_once(quantized, cache, monkeypatch):
  found = pipeline.find_sensitivities(WORKLOAD, quantized, CONFIG, cache)
  expected = sensitivity.first_order(
    quantized,
    WORKLOAD.variables,
    *WORKLOAD.calibration,
    key=jax.random.key(0),
    widths=CONFIG.bit_widths,
  )
  np.testing.assert_array_equal(found, expected)
  monkeypatch.setitem(sensitivity.METHODS, 'first_order', pytest.fail)
  again = pipeline.find_sensitivities(WORKLOAD, quantized, CONFIG, cache)
  np.testing.assert_array_equal(again, found)
  none = replace(CONFIG, sensitivities='none')
  assert pipeline.find_sensitivities(WORKLOAD, quantized, none, cache) is None


def test_sensitivities_of_another_shape_are_made_again(quantized, cache):
  pipeline.find_sensitivities(WORKLOAD, quantized, CONFIG, cache)
  (path,) = (cache / 'sensitivities').iterdir()
  before = path.read_bytes()
  files.write_arrays(path, {'sensitivities': np.zeros((4, 2), np.float32)})
  with pytest.warns(UserWarning, match=r'of shape \(4, 3\); it is made again'):
    pipeline.find_sensitivities(WORKLOAD, quantized, CONFIG, cache)
  assert path.read_bytes() == before


@pytest.mark.parametrize('method', sensitivity.METHODS)
def test_passes_over_calibration_images_are_evaluations(quantized, method):
  passes = sensitivity.passes(method, 4, 3)
  found = pipeline.sensitivity_evaluations(
    WORKLOAD, quantized, method, CONFIG.bit_widths
  )
  # 20 images a pass, of the 30 that an evaluation takes.
  assert found - 1 < passes * 20 / 30 <= found


@pytest.fixture(scope='module')
def prepared(quantized, cache):
  del quantized  # of which the cache has the bank
  return pipeline.prepare(WORKLOAD, CONFIG, cache)


def test_the_problem_is_on_the_images_of_the_search(prepared):
  problem = prepared.problem
  assert problem.allowed.shape == (4, 3)
  np.testing.assert_array_equal(problem.data.labels, WORKLOAD.search.labels)
  np.testing.assert_array_equal(problem.data.bit_widths, CONFIG.bit_widths)
  assert problem.objective_names == CONFIG.objectives
  assert problem.prior is not None
  np.testing.assert_allclose(problem.prior.loss, prepared.sensitivities)
  assert prepared.config is CONFIG


def test_a_problem_may_be_of_other_images_and_objectives(prepared):
  problem = pipeline.make_problem(
    WORKLOAD,
    prepared.quantized,
    CONFIG,
    None,
    images=WORKLOAD.test,
    objectives=('divergence', 'size'),
  )
  np.testing.assert_array_equal(problem.data.labels, WORKLOAD.test.labels)
  assert problem.objective_names == ('divergence', 'size')
  assert problem.prior is None


def test_the_paper_searches_blind():
  config = replace(PLAIN, species=('paper',))
  found = pipeline.prepare(WORKLOAD, config)
  assert found.sensitivities is None
  assert found.problem.prior is None


def test_candidates_at_once_are_those_of_the_config():
  config = replace(PLAIN, species=('paper',), batch_size=3)
  assert pipeline.prepare(WORKLOAD, config).batch_size == 3


def test_labels_of_the_test_are_refused_before_the_search():
  inputs, labels = WORKLOAD.test
  for wrong in (labels + 1, labels[1:]):
    workload = WORKLOAD._replace(test=Images(inputs, wrong))
    with pytest.raises(InputError, match='labels'):
      pipeline.prepare(workload, PLAIN)


def test_memory_limits_the_images_at_once(prepared):
  structure = prepared.quantized.structure
  at_once = lambda gib, n=1: pipeline.images_at_once(
    structure, replace(CONFIG, memory_gib=gib), n
  )
  image = structure.bytes_per_image / 2**30
  assert at_once(1e-12) == 1
  few = at_once(200 * image)
  assert 1 < few <= 200
  assert at_once(400 * image) > few > at_once(200 * image, 2)
  assert pipeline.images_at_once(structure, CONFIG) > at_once(1e-12)


def test_programs_are_kept_where_they_were_if_a_place_is_set(tmp_path):
  # The tests have set one.
  before = jax.config.jax_compilation_cache_dir
  assert before is not None
  pipeline.keep_programs(tmp_path)
  assert jax.config.jax_compilation_cache_dir == before
