"""Data sets that TFDS wrote, and how they are prepared."""

import hashlib
import io
import json
import os
import pathlib
import subprocess
import sys
import tarfile
import time

import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds

from nemo_jax import data
from nemo_jax.data import images
from tests.pictures import (
  TEN,
  WNIDS,
  arrays,
  class_folders,
  digest_of,
  jpeg,
  need_tensorflow,
  read,
  refused,
)

ROOT = pathlib.Path(__file__).parents[2]


def tiny(folder, file_format='array_record', **options):
  """Prepares a data set of nine images; see the defaults for the options."""
  need_tensorflow()
  own = {
    'splits': ('train',),
    'names': tuple(WNIDS),
    'labelled': True,
    'first': 0,
    'shards': 1,
  } | options
  with tfds.core.registered.skip_registration():

    class Tiny(tfds.core.GeneratorBasedBuilder):
      VERSION = tfds.core.Version('1.0.0')

      def _info(self):
        label = np.int64
        if own['names']:
          label = tfds.features.ClassLabel(names=own['names'])
        features = {
          'image': tfds.features.Image(encoding_format='jpeg'),
          'label': label,
        }
        return tfds.core.DatasetInfo(
          builder=self,
          features=tfds.features.FeaturesDict(features),
          supervised_keys=('image', 'label'),
        )

      def _split_generators(self, manager):
        del manager
        return {name: self._generate_examples() for name in own['splits']}

      def _generate_examples(self):
        for i in range(9):
          image = io.BytesIO(jpeg(own['first'] + i))
          label = i % 3 if own['labelled'] else -1
          yield i, {'image': image, 'label': label}

  builder = Tiny(data_dir=str(folder), file_format=file_format)
  builder.download_and_prepare(
    download_config=tfds.download.DownloadConfig(num_shards=own['shards'])
  )
  return pathlib.Path(builder.data_dir)


@pytest.mark.parametrize('file_format', ['array_record', 'tfrecord'])
def test_data_sets_that_tfds_wrote(tmp_path, file_format):
  tiny(tmp_path, file_format)
  source = data.open_source(str(tmp_path), 'train', 1000)
  assert source.size == 9
  assert source.classes == {label: name for name, label in WNIDS.items()}
  one, same = (list(source.examples(3)) for _ in range(2))
  labels = list(WNIDS.values())
  assert {e.content(): e.label for e in one} == {
    jpeg(i): labels[i % 3] for i in range(9)
  }
  assert [e.content() for e in one] == [e.content() for e in same]


def test_another_seed_is_another_order(tmp_path):
  tiny(tmp_path / 'tfds')
  # Of these the files are shuffled.
  tiny(tmp_path / 'records', 'tfrecord', shards=4)
  class_folders(tmp_path / 'folders', TEN)
  np.savez(tmp_path / 'a.npz', **arrays())
  for where, classes in (
    ('tfds', 1000),
    ('records', 1000),
    ('folders', 10),
    ('a.npz', 10),
  ):
    orders = [
      [np.asarray(e.content()).tobytes() for e in examples]
      for examples in (
        read(tmp_path / where, num_classes=classes, seed=seed)
        for seed in (0, 0, 1)
      )
    ]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2])


def test_a_data_set_is_found_from_the_folders_above(tmp_path):
  folder = tiny(tmp_path)
  identities = {
    data.open_source(str(where), 'train', 1000).identity
    for where in (folder, folder.parent, tmp_path)
  }
  assert len(identities) == 1


def test_several_data_sets_in_one_folder_are_listed(tmp_path):
  for name in ('a', 'b'):
    tiny(tmp_path / name)
  with refused('has several data sets; name one: a/tiny/1.0.0, b/tiny/1.0.0'):
    data.open_source(str(tmp_path), 'train', 1000)


def test_a_data_set_that_was_written_anew_is_another(tmp_path):
  found = []
  for first in (0, 100):
    folder = tiny(tmp_path / str(first), first=first).parent
    (tmp_path / 'now').mkdir(exist_ok=True)
    folder.rename(tmp_path / 'now' / 'tiny')
    source = data.open_source(str(tmp_path / 'now'), 'train', 1000)
    found.append((source.identity, {e.content() for e in source.examples(0)}))
    (tmp_path / 'now' / 'tiny').rename(folder)
  assert found[0][1] != found[1][1]
  assert found[0][0] != found[1][0]


@pytest.mark.parametrize(
  ('splits', 'role', 'chosen'),
  [
    (('test',), 'validation', 'test'),
    (('train', 'test'), 'validation', 'test'),
    (('train', 'validation', 'test'), 'validation', 'validation'),
    (('train', 'test'), 'train', 'train'),
    (('train',), 'validation', 'train'),
  ],
)
def test_a_split_for_each_role(tmp_path, splits, role, chosen):
  tiny(tmp_path, splits=splits)
  source = data.open_source(str(tmp_path), role, 1000)
  assert source.name == f'tiny/1.0.0 {chosen}'
  assert len(list(source.examples(0))) == 9


@pytest.mark.parametrize(
  ('options', 'words'),
  [
    ({'splits': ('test',)}, 'has no split train; the choices are test'),
    ({'names': ()}, 'is no classification'),
    ({'names': ('a', 'b', 'c')}, "'a', which is no WordNet id"),
  ],
)
def test_data_sets_that_are_not_for_training(tmp_path, options, words):
  folder = tiny(tmp_path, **options)
  with refused(f'{folder} .*{words}'):
    data.open_source(str(tmp_path), 'train', 1000)


def test_the_names_of_a_data_set_are_as_many_as_the_classes(tmp_path):
  tiny(tmp_path, names=('c', 'b', 'a'))
  source = data.open_source(str(tmp_path), 'train', 3)
  assert source.classes == {0: 'c', 1: 'b', 2: 'a'}
  with refused('has 3 classes; the network has 10'):
    data.open_source(str(tmp_path), 'train', 10)


def test_images_without_labels_are_refused(tmp_path):
  folder = tiny(tmp_path, splits=('train', 'test'), labelled=False)
  with refused(f'the split test of {folder} has no labels'):
    read(tmp_path, 'validation')


def test_without_tensorflow_its_records_are_refused(tmp_path, monkeypatch):
  folder = tiny(tmp_path, 'tfrecord')
  monkeypatch.setitem(sys.modules, 'tensorflow', None)
  with refused(rf"{folder} holds TFRecords, .*'nemo_jax\[tensorflow]'"):
    data.open_source(str(tmp_path), 'train', 1000)


def test_every_training_image_has_the_class_of_its_file(imagenet_tfds):
  source = data.open_source(str(imagenet_tfds), 'train', 1000)
  assert source.size == 1000
  assert len(source.classes) == 1000
  examples = list(source.examples(0))
  names = [e.key.removeprefix(f'{imagenet_tfds}: ') for e in examples]
  assert len(set(names)) == 1000
  classes = data.imagenet_classes()
  wnids = [name.split('_')[0] for name in names]
  assert [e.label for e in examples] == [classes[wnid] for wnid in wnids]
  assert set(wnids) == set(classes)


def test_training_images_are_those_of_the_tar(shared, imagenet_tfds):
  examples = read(imagenet_tfds)[:20]
  with tarfile.open(shared / 'imagenet' / 'ILSVRC2012_img_train.tar') as outer:
    for example in examples:
      name = example.key.rpartition(' ')[2]
      inside = outer.extractfile(f'{name.split("_")[0]}.tar')
      with tarfile.open(fileobj=inside) as inner:
        content = inner.extractfile(name).read()
      pixels, digest = images.decode(example, 256, 224)
      with PIL.Image.open(io.BytesIO(content)) as image:
        assert digest == digest_of(image)
        expected = images.preprocess(image, 256, 224)
      np.testing.assert_array_equal(pixels, expected)


WITHOUT_TENSORFLOW = """
import hashlib, importlib.machinery, itertools, json, sys
finder = importlib.machinery.PathFinder
find = finder.find_spec
finder.find_spec = lambda name, *rest: (
  None if name == 'tensorflow' else find(name, *rest)
)
from nemo_jax import data
source = data.open_source('tfds:imagenet2012', 'train', 1000)
for e in itertools.islice(source.examples(5), 4):
  digest = hashlib.sha256(e.content()).hexdigest()
  print(json.dumps([e.key, e.label, digest]))
try:
  import tensorflow
except ImportError:
  print('absent')
"""


def test_reading_needs_no_tensorflow(imagenet_tfds):
  folder = imagenet_tfds.parents[1]
  output = subprocess.run(
    [sys.executable, '-c', WITHOUT_TENSORFLOW],
    cwd=ROOT,
    env={**os.environ, 'TFDS_DATA_DIR': str(folder)},
    capture_output=True,
    text=True,
    check=False,
  )
  assert output.returncode == 0, output.stderr
  *lines, last = output.stdout.splitlines()
  assert last == 'absent'
  assert [json.loads(line) for line in lines] == [
    [e.key, e.label, hashlib.sha256(e.content()).hexdigest()]
    for e in read(imagenet_tfds, seed=5)[:4]
  ]


@pytest.mark.parametrize(
  ('name', 'words'),
  [
    ('no_such_data', "TFDS has no data set 'no_such_data': .*not found"),
    ('imagenet2012:9.9.9', "'imagenet2012:9.9.9': .*only: 5.1.0"),
    ('', "TFDS has no data set ''"),
    (
      'imagenette',
      'imagenette is not prepared in .*imagenette/.*; run '
      'python -m experiments.prepare --dataset=imagenette$',
    ),
  ],
)
def test_names_that_tfds_has_not(tmp_path, monkeypatch, name, words):
  monkeypatch.setattr(tfds.core.constants, 'DATA_DIR', str(tmp_path))
  with refused(words):
    data.open_source(f'tfds:{name}', 'train', 10)


@pytest.mark.parametrize('file_format', ['array_record', 'tfrecord'])
@pytest.mark.parametrize('part', ['image', 'dataset_info.json', 'shard'])
def test_a_damaged_data_set_is_named(tmp_path, file_format, part):
  folder = tiny(tmp_path, file_format)
  (shard,) = folder.glob('*-00000-of-00001')
  file = folder / part if part.endswith('.json') else shard
  content = file.read_bytes()
  if part == 'shard':
    file.unlink()
  else:
    used = np.flatnonzero(np.frombuffer(content, np.uint8))
    place = int(np.median(used)) if part == 'image' else 9
    hurt = bytes([content[place] ^ 1])
    file.write_bytes(content[:place] + hurt + content[place + 1 :])
  with refused(f'cannot read {folder}'):
    read(tmp_path)


def test_a_data_set_that_was_mended_in_place_is_another(tmp_path):
  folder = tiny(tmp_path)
  identity = lambda: data.open_source(str(tmp_path), 'train', 1000).identity
  before = identity()
  (shard,) = folder.glob('*-00000-of-00001')
  time.sleep(0.05)  # the clock of the file system
  shard.write_bytes(shard.read_bytes())
  assert identity() != before
