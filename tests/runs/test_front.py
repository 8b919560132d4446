"""front.json: what was found comes back, of every version that there was."""

import contextlib
import dataclasses
import json

import pytest

import nemo_jax
from nemo_jax import InputError
from nemo_jax.core import files
from nemo_jax.runs import schema
from nemo_jax.runs.front import Front, Point, read
from tests.runs import fronts

# As the first version wrote it: no digest, and a point has no sizes.
OLD = {
  'version': 1,
  'workload': 'digits',
  'evaluations': 60,
  'failures': 0,
  'hypervolume': None,
  'uniform_hypervolume': 0.5,
  'objective_names': ['top1_error', 'size'],
  'quantizers': ['a:input', 'a/kernel'],
  'is_weight': [False, True],
  'bit_widths': [2, 8],
  'species': ['direct'],
  'float': {'objectives': [0.0, 1.0], 'test_accuracy': 0.9},
  'points': [{'bits': [2, 8], 'objectives': [0.1, 0.25], 'species': 'direct'}],
  'uniform': [{'bits': [8, 8], 'objectives': [None, 0.25]}],
}


def load(folder, content) -> Front:
  (folder / 'front.json').write_text(json.dumps(content))
  return Front.load(folder)


@pytest.mark.parametrize(
  'front',
  [
    fronts.toy(),
    fronts.empty(),
    fronts.of_two_objectives(fronts.toy(hypervolume=None)),
    fronts.toy(uniform=(fronts.point(0.5, 0.1, objectives=(None, 0.1, 0.1)),)),
    fronts.toy(float_point=None, ideal=(), seed=None, versions={'jax': '1'}),
  ],
  ids=['toy', 'empty', 'two objectives', 'not finite', 'little'],
)
def test_what_is_saved_is_loaded(tmp_path, front):
  front.save(tmp_path)
  found = Front.load(tmp_path)
  assert found == front
  assert type(found.points) is tuple
  # A second time it is the same file.
  before = (tmp_path / 'front.json').read_bytes()
  found.save(tmp_path)
  assert (tmp_path / 'front.json').read_bytes() == before


def test_a_front_says_what_found_it(tmp_path):
  front = fronts.toy()
  assert front.versions['nemo_jax'] == nemo_jax.__version__
  assert {'jax', 'python'} < front.versions.keys()
  older = dataclasses.replace(front, versions={'nemo_jax': '0.1'})
  older.save(tmp_path)
  assert Front.load(tmp_path).versions == {'nemo_jax': '0.1'}


def test_the_file_has_its_schema(tmp_path):
  fronts.toy().save(tmp_path)
  content = json.loads((tmp_path / 'front.json').read_text())
  assert content['version'] == 2
  assert files.is_sealed(content)
  schema.validate(content, 'front.json', schema.REPORTED)
  assert not content.keys() & {'model', 'float_point'}


def test_the_shortfall_of_a_choice_is_not_stored(tmp_path):
  missed = dataclasses.replace(fronts.toy().points[0], shortfall=('1 MB',))
  fronts.toy(points=(missed,)).save(tmp_path)
  assert Front.load(tmp_path).points[0].shortfall == ()
  fronts.write(tmp_path, points=[{'bits': [2, 2, 2], 'shortfall': 7}])
  assert Front.load(tmp_path).points[0].shortfall == ()


@pytest.mark.parametrize('version', [1, 2])
def test_what_an_older_file_lacks_is_none_or_empty(tmp_path, version):
  content = OLD | {'version': version}
  front = load(tmp_path, files.seal(content) if version == 2 else content)
  assert front.points == (
    Point(bits=(2, 8), objectives=(0.1, 0.25), species='direct'),
  )
  assert front.uniform == (Point(bits=(8, 8), objectives=(None, 0.25)),)
  assert front.float_point == Point(objectives=(0, 1), test_accuracy=0.9)
  assert front.hypervolume is None
  assert front.uniform_hypervolume == 0.5
  for name in ('seed', 'run', 'model'):
    assert getattr(front, name) is None, name
  for name in ('ideal', 'reference', 'images', 'network', 'versions'):
    assert len(getattr(front, name)) == 0, name


def test_the_least_that_is_a_front_is_loaded(tmp_path):
  front = load(tmp_path, {'version': 1})
  assert front == Front(
    workload='',
    objective_names=(),
    quantizers=(),
    points=(),
    versions={},
  )


def test_keys_that_are_not_known_do_no_harm(tmp_path):
  fronts.write(tmp_path, more=[{}], model='x', float_point='y')
  assert Front.load(tmp_path) == fronts.toy()


def test_a_front_of_another_version_or_none_is_refused(tmp_path):
  with pytest.raises(InputError, match=r'front\.json: No such file'):
    Front.load(tmp_path)
  for version in ('99', '0', 'null', '"2"', '1.5', '[1]', 'true'):
    (tmp_path / 'front.json').write_text(f'{{"version": {version}}}')
    with pytest.raises(InputError, match='has version .*this package reads'):
      Front.load(tmp_path)


def test_version_1_may_have_a_digest_and_version_2_has_to(tmp_path):
  sealed = files.seal(OLD)
  assert load(tmp_path, sealed) == load(tmp_path, OLD)
  with pytest.raises(files.DamagedError):
    load(tmp_path, sealed | {'points': []})
  with pytest.raises(files.DamagedError):
    load(tmp_path, OLD | {'version': 2})


def test_keys_may_be_asked_for(tmp_path):
  load(tmp_path, {'version': 1, 'workload': 'a'})
  with pytest.raises(InputError, match='quantizers is missing'):
    Front.load(tmp_path, needed=schema.SCORED)


def test_every_changed_byte_of_a_front_is_noticed(tmp_path):
  front = Front(
    workload='a',
    objective_names=('b', 'c'),
    quantizers=('d',),
    points=(Point(bits=(2,)),),
  )
  front.save(tmp_path)
  path = tmp_path / 'front.json'
  content, whole = path.read_bytes(), read(tmp_path)
  for place in range(len(content)):
    for change in (1, 16, 128):
      hurt = bytearray(content)
      hurt[place] ^= change
      path.write_bytes(hurt)
      found = None
      with contextlib.suppress(InputError):
        found = read(tmp_path)
      # White space may become other white space.
      assert found in (None, whole)


def test_a_folder_that_takes_no_file_is_named(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(InputError, match='cannot use'):
    fronts.toy().save(tmp_path / 'file')
