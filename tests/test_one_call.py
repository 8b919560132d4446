"""One call from a network to a front; the same call again resumes it."""

import dataclasses

import jax.numpy as jnp
import moocore
import numpy as np
import pytest

import nemo_jax
from nemo_jax import Front, InputError, runs, search_run
from nemo_jax.config import FieldError
from nemo_jax.one_call import divide
from nemo_jax.quantization import costs
from nemo_jax.search import species
from nemo_jax.tasks.objectives import in_top_k
from tests import tiny

VARIABLES = tiny.variables()
INPUTS, LABELS = tiny.examples(120)
TEST = tiny.examples(50, seed=1)
# What compiles in seconds.
QUICK = {
  'species': ('direct',),
  'sensitivities': 'none',
  'reconstruct': (),
  'population': 8,
}


def search(inputs=INPUTS, labels=LABELS, apply=tiny.apply, **more) -> Front:
  return nemo_jax.search(apply, VARIABLES, inputs, labels, **more)


@pytest.fixture(scope='module')
def kept(tmp_path_factory):
  """A folder, the call that made it, and the front."""
  folder = tmp_path_factory.mktemp('kept')
  call = {'evaluations': 23, 'population': 8, 'test': TEST, 'workdir': folder}
  return folder, call, search(**call)


def test_a_call_finds_a_front(kept):
  folder, _, front = kept
  assert front.workload == 'model'
  assert front.species == species.NEMO
  assert (front.seed, front.evaluations, front.failures) == (0, 16, 0)
  assert front.objective_names == ('top1_error', 'size', 'bit_operations')
  assert front.quantizers == ('hidden:input', 'hidden', 'out:input', 'out')
  assert front.images == {'calibration': 30, 'search': 90, 'test': 50}
  assert 0 < front.hypervolume < 1
  values = np.asarray([p.objectives for p in front.points])
  assert len(values)
  assert moocore.is_nondominated(values, keep_weakly=False).all()
  assert values.tolist() == sorted(values.tolist())
  assert [u.bits for u in front.uniform] == [(b,) * 4 for b in range(2, 9)]
  assert front == Front.load(folder)


def test_points_say_what_they_cost(kept):
  _, _, front = kept
  table = front.model.quantized.costs
  for point in (*front.points, *front.uniform):
    bits = np.asarray(point.bits)
    assert point.size_mb * 8e6 == pytest.approx(costs.model_size(table, bits))
    work = costs.bit_operations(table, bits) / 1e9
    assert point.gbitops == pytest.approx(work)
  # In 32-bit floats, without a scale.
  floats = sum(x.size for x in VARIABLES.values())
  assert front.float_point.size_mb * 1e6 == 4 * floats
  assert front.float_point.objectives[1:] == (1, 1)


def test_test_accuracies_are_those_of_the_network_at_the_points(kept):
  folder, _, front = kept
  inputs, labels = TEST
  loaded = Front.load(folder, tiny.apply, VARIABLES)
  for point in (front.points[0], front.points[-1], front.uniform[1]):
    for one in (front, loaded):
      # Ties count as wrong.
      right = in_top_k(one.apply(point)(inputs), labels, 1)
      assert np.mean(right) == pytest.approx(point.test_accuracy)
  right = tiny.apply(VARIABLES, inputs).argmax(axis=1) == labels
  assert front.float_point.test_accuracy == pytest.approx(np.mean(right))
  assert all(p.test_top5_accuracy >= p.test_accuracy for p in front.points)


def test_a_point_is_selected_and_runs(kept):
  _, _, front = kept
  point = front.select(max_size_mb=front.uniform[-1].size_mb)
  assert front.apply(point)(INPUTS[:5]).shape == (5, tiny.CLASSES)
  assert front.plot().axes


def test_the_same_call_again_evaluates_nothing(kept, monkeypatch):
  _, call, front = kept
  monkeypatch.setattr(search_run, 'evolve', pytest.fail)
  again = search(**call)
  assert again == front
  np.testing.assert_array_equal(again.apply(0)(INPUTS), front.apply(0)(INPUTS))


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    ({'seed': 1}, 'seed=0 became 1'),
    ({'bit_widths': (2, 4, 8)}, 'bit_widths='),
    ({'labels': (LABELS + 1) % 6}, 'labels of the .* changed'),
    ({'test': (TEST[0], TEST[1][::-1].copy())}, 'labels of the test changed'),
  ],
)
def test_another_call_in_its_folder_is_refused(kept, changes, words):
  folder, call, front = kept
  with pytest.raises(InputError, match=words) as caught:
    search(**call | changes)
  assert '\n' not in str(caught.value)
  assert Front.load(folder) == front


def of_dictionary(variables, inputs):
  """The network on other inputs: a dictionary of halves."""
  whole = jnp.concatenate([inputs['low'], inputs['high']], axis=1)
  return tiny.apply(variables, whole)


def halves(inputs):
  return {'low': inputs[:, :8], 'high': inputs[:, 8:]}


def test_a_call_that_was_stopped_goes_on_to_the_same_front(
  tmp_path, monkeypatch
):
  call = QUICK | {'evaluations': 24, 'apply': of_dictionary, 'name': 'halves'}
  call |= {'inputs': halves(INPUTS)}
  whole = search(**call)
  evolve, done = runs.evolve, []

  def stopped(*arguments):
    for pair in evolve(*arguments):
      done.append(int(pair[0].generation))
      yield pair
      if len(done) == 2:
        raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(runs, 'evolve', stopped)
    with pytest.raises(KeyboardInterrupt):
      search(**call, workdir=tmp_path)
    assert not (tmp_path / 'front.json').exists()
    front = search(**call, workdir=tmp_path)
  assert done == [1, 2, 3]
  assert len(runs.read_metrics(tmp_path)) == 3
  assert front.run is not None
  assert dataclasses.replace(front, run=None) == whole
  assert whole.points[0].test_accuracy is None
  assert 'test' not in whole.images
  # Inputs that are a dictionary are traced again as one.
  loaded = Front.load(tmp_path, of_dictionary, VARIABLES)
  np.testing.assert_array_equal(
    loaded.apply(0)(halves(INPUTS)), whole.apply(0)(halves(INPUTS))
  )


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    ({'labels': LABELS[:-1]}, r'120 inputs and labels of shape \(119,\)'),
    ({'inputs': INPUTS[:1], 'labels': LABELS[:1]}, 'there are 1 inputs'),
    ({'inputs': INPUTS[:0], 'labels': LABELS[:0]}, 'there are no inputs'),
    ({'inputs': 'images'}, 'inputs are a str; give arrays'),
    ({'labels': LABELS + 1}, 'classes are whole numbers from 0 to 5'),
    ({'labels': LABELS / 1}, 'classes are whole numbers from 0 to 5'),
    ({'test': (TEST[0], TEST[1][1:])}, r'test has 50 inputs and labels of sh'),
    ({'test': (TEST[0][:, 1:], TEST[1])}, r'inputs of shape \(15,\); those of'),
    ({'test': (TEST[0], TEST[1] + 1)}, 'classes are whole numbers from 0 to 5'),
    ({'evaluations': 7}, 'population: a population of 7 is too small for 4'),
    ({'evaluations': 0}, 'evaluations is 0; give a whole number from 1'),
    ({'evaluations': 'many'}, "evaluations is 'many'; give a whole number"),
    ({'seed': -1}, 'seed: it is -1; give a whole number from 0'),
    ({'species': ('ants',)}, "species: unknown species 'ants'"),
    ({'lowering': 'fast'}, "lowering: it is 'fast'; the choices are"),
    ({'workdir': 'gs://bucket/run'}, 'is a URL'),
  ],
)
def test_what_cannot_be_used_is_one_line(changes, words):
  # Reconstruction takes seconds, and comes before some labels are looked at.
  with pytest.raises(InputError, match=words) as caught:
    search(**{'reconstruct': ()} | changes)
  assert '\n' not in str(caught.value)


def test_fields_that_are_none_are_an_error_of_the_caller():
  with pytest.raises(TypeError, match='colour'):
    search(colour='red')
  with pytest.raises(FieldError):
    search(population=3)


def test_inputs_are_divided_at_random_and_by_the_seed():
  (first, labels), (rest, others) = divide(INPUTS, LABELS, 0)
  assert (len(labels), len(others)) == (30, 90)
  rows = np.concatenate([first, rest])
  assert sorted(rows.tolist()) == sorted(INPUTS.tolist())
  index = {
    row.tobytes(): label for row, label in zip(INPUTS, LABELS, strict=True)
  }
  for row, label in zip(rows, np.concatenate([labels, others]), strict=True):
    assert index[row.tobytes()] == label
  again, other = divide(INPUTS, LABELS, 0), divide(INPUTS, LABELS, 1)
  np.testing.assert_array_equal(again[0].images, first)
  assert np.any(other[0].images != first)
  few = divide(INPUTS[:2], LABELS[:2], 0)
  assert [len(part.labels) for part in few] == [1, 1]
  many = divide(np.zeros((2000, 1)), np.zeros(2000, int), 0)
  assert [len(part.labels) for part in many] == [256, 1744]


def test_the_call_and_the_package_of_its_name_go_together():
  import nemo_jax.search.species.direct  # noqa: F401 (what is tested)
  from nemo_jax.search import nemo

  assert callable(nemo_jax.search)
  assert nemo_jax.nemo is nemo
