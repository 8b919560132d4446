"""Sources of labelled images: what they hand out, and what is refused."""

import contextlib
import hashlib
import io
import json
import os
import pathlib
import subprocess
import sys
import tarfile

import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds

from nemo_jax import InputError, data, images

ROOT = pathlib.Path(__file__).parent.parent
WNIDS = {'n01440764': 0, 'n01443537': 1, 'n02119789': 278}
TEN = tuple('jihgfedcba')


@contextlib.contextmanager
def refused(words):
  with pytest.raises(InputError, match=words) as caught:
    yield
  assert '\n' not in str(caught.value)


def noise(seed, height=40, width=50):
  generator = np.random.default_rng(seed)
  return generator.integers(0, 256, (height, width, 3), np.uint8)


def jpeg(seed):
  file = io.BytesIO()
  PIL.Image.fromarray(noise(seed)).save(file, 'JPEG')
  # All of one size, so that sizes alone tell nothing.
  return file.getvalue().ljust(4000, b'\0')


def need_tensorflow():
  for name in ('tensorflow', 'importlib_resources'):
    pytest.importorskip(name, reason='writing TFDS data needs TensorFlow')


def class_folders(path, names=tuple(WNIDS)):
  """An image a class, and the folder of the classes."""
  for i, name in enumerate(names):
    (path / name).mkdir(parents=True)
    (path / name / f'{i}.JPEG').write_bytes(jpeg(i))
  return path


def read(where, role='train', num_classes=1000, seed=0):
  return list(data.open_source(str(where), role, num_classes).examples(seed))


def classes_of(examples):
  """The label of each class folder."""
  return {pathlib.Path(e.key).parent.name: e.label for e in examples}


def test_imagenet_has_a_thousand_classes_in_order():
  classes = data.imagenet_classes()
  assert list(classes) == sorted(classes)
  assert list(classes.values()) == list(range(1000))
  assert {name: classes[name] for name in WNIDS} == WNIDS


def test_wordnet_ids_have_their_place_among_all(tmp_path):
  class_folders(tmp_path, [*reversed(WNIDS)])
  assert classes_of(read(tmp_path)) == WNIDS
  source = data.open_source(str(tmp_path), 'train', 1000)
  assert source.classes == {label: name for name, label in WNIDS.items()}
  assert source.size == 3


@pytest.mark.parametrize('count', [10, 1000])
def test_as_many_folders_as_classes_count_in_order(tmp_path, count):
  names = [f'kind{i:04}' for i in range(count)]
  class_folders(tmp_path, reversed(names))
  labels = classes_of(read(tmp_path, num_classes=count))
  assert labels == {name: i for i, name in enumerate(names)}


def test_every_image_of_the_validation_folder_has_its_class(shared):
  folder = shared / 'imagenet' / 'val'
  examples = read(folder, 'validation')
  assert {e.key for e in examples} == {str(f) for f in folder.glob('*/*.JPEG')}
  for example in examples:
    wnid = pathlib.Path(example.key).parent.name
    assert example.label == data.imagenet_classes()[wnid]


@pytest.mark.parametrize(
  ('folders', 'role', 'chosen'),
  [
    (('train', 'val'), 'train', 'train'),
    (('train', 'val'), 'validation', 'val'),
    (('train', 'validation', 'val', 'test'), 'validation', 'validation'),
    (('train', 'test'), 'validation', 'test'),
    (('train',), 'validation', 'train'),
    (('val',), 'validation', 'val'),
  ],
)
def test_a_folder_for_each_role(tmp_path, folders, role, chosen):
  for name in folders:
    class_folders(tmp_path / name)
  keys = {e.key for e in read(tmp_path, role)}
  assert keys == {str(f) for f in (tmp_path / chosen).glob('*/*.JPEG')}


@pytest.mark.parametrize('layout', ['folders', 'train folder', 'arrays'])
def test_the_only_images_serve_both_roles_as_the_same(tmp_path, layout):
  if layout == 'arrays':
    where = tmp_path / 'a.npz'
    np.savez(where, **arrays())
  else:
    where = tmp_path
    class_folders(where / 'train' if layout == 'train folder' else where, TEN)
  one, other = (
    data.open_source(str(where), role, 10) for role in ('train', 'validation')
  )
  assert one.identity == other.identity


def test_what_is_hidden_or_no_image_is_left_out(tmp_path):
  class_folders(tmp_path)
  (tmp_path / '.git').mkdir()
  (tmp_path / 'README').write_text('of the images')
  for name in ('.DS_Store', '._0.JPEG', 'list.txt'):
    (tmp_path / 'n01440764' / name).write_text('no image')
  assert len(read(tmp_path)) == 3


def test_suffixes_of_either_case(tmp_path):
  class_folders(tmp_path)
  for name in ('1.jpg', '2.JPG', '3.png', '4.Jpeg'):
    (tmp_path / 'n01440764' / name).write_bytes(jpeg(0))
  assert len(read(tmp_path)) == 7


@pytest.mark.parametrize(
  ('names', 'num_classes', 'words'),
  [
    ((*WNIDS, 'tench'), 1000, "'tench', which is no WordNet id"),
    (('n00000000',), 1000, "'n00000000', which is no WordNet id"),
    (TEN[:9], 10, 'has 9 classes; the network has 10'),
    (tuple(WNIDS), 10, 'has 3 classes; the network has 10'),
    (('.hidden',), 10, 'has 0 classes; the network has 10'),
    (('.hidden',), 1000, 'folder'),
    ((), 10, 'neither a TFDS data set nor a folder for each class'),
  ],
)
def test_folders_that_are_not_the_classes(tmp_path, names, num_classes, words):
  class_folders(tmp_path, names)
  with refused(f'{tmp_path}.*{words}'):
    data.open_source(str(tmp_path), 'train', num_classes)


def test_an_empty_class_is_named(tmp_path):
  class_folders(tmp_path)
  (tmp_path / 'n01443537' / '1.JPEG').rename(tmp_path / 'n01443537' / '1.txt')
  with refused(f'{tmp_path}/n01443537 holds no image; known are .jpg'):
    data.open_source(str(tmp_path), 'train', 1000)


def test_tars_are_to_be_prepared(tmp_path):
  (tmp_path / 'ILSVRC2012_img_train.tar').write_bytes(b'')
  with refused(f'experiments.prepare --tars={tmp_path} --data=FOLDER'):
    data.open_source(str(tmp_path), 'train', 1000)


def test_places_that_are_nothing_of_the_kind(tmp_path):
  with refused(f'there is no {tmp_path}/nothing'):
    data.open_source(str(tmp_path / 'nothing'), 'train', 10)
  (tmp_path / 'file').write_text('')
  with refused('file is neither a folder nor an .npz'):
    data.open_source(str(tmp_path / 'file'), 'train', 10)
  class_folders(tmp_path / 'only' / 'val')
  with refused('only has no folder train'):
    data.open_source(str(tmp_path / 'only'), 'train', 1000)


def arrays(**changes):
  whole = {
    'x': np.stack([noise(i, 8, 9) for i in range(30)]),
    'y': np.arange(30) % 10,
  }
  return {k: v for k, v in (whole | changes).items() if v is not None}


@pytest.mark.parametrize('shape', [(30,), (30, 1)])
def test_arrays_keep_pixels_and_labels_together(tmp_path, shape):
  stored = arrays()
  path = tmp_path / 'a.npz'
  np.savez(path, x=stored['x'], y=stored['y'].reshape(shape))
  source = data.open_source(str(path), 'train', 10)
  assert source.size == 30
  assert source.classes == {i: str(i) for i in range(10)}
  found = {e.content().tobytes(): e.label for e in source.examples(0)}
  pairs = zip(stored['x'], stored['y'], strict=True)
  assert found == {x.tobytes(): y for x, y in pairs}


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    ({'x': np.zeros((30, 8, 9, 3), np.float32)}, r'x is float32\[30, 8, 9, 3]'),
    ({'x': np.zeros((30, 9, 3), np.uint8)}, r'x is uint8\[30, 9, 3]'),
    ({'x': np.zeros((30, 8, 9, 4), np.uint8)}, r'x is uint8\[30, 8, 9, 4]'),
    ({'y': np.zeros(30)}, r'y is float64\[30]'),
    ({'y': np.zeros(29, int)}, r'y is int64\[29]; there are 30'),
    ({'y': np.arange(30)}, 'a.npz.* 29.* 10'),
    ({'y': np.arange(30) % 10 - 1}, 'a.npz.* -1.* 10'),
    ({'x': np.zeros((0, 8, 9, 3), np.uint8), 'y': np.zeros(0, int)}, 'a.npz'),
    ({'x': None}, 'holds no arrays x and y'),
    ({'y': None}, 'holds no arrays x and y'),
  ],
)
def test_arrays_that_are_no_labelled_images(tmp_path, changes, words):
  path = tmp_path / 'a.npz'
  np.savez(path, **arrays(**changes))
  with refused(words):
    data.open_source(str(path), 'train', 10)


@pytest.mark.parametrize(
  'damage',
  [
    lambda content: b'',
    lambda content: b'no archive',
    lambda content: content[: len(content) // 2],
    lambda content: content[:3000] + b'flipped' + content[3007:],
    lambda content: content[:26] + bytes(4) + content[30:],
    lambda content: content[:29] + b'\xff' + content[30:],
  ],
)
def test_damaged_arrays_are_named(tmp_path, damage):
  path = tmp_path / 'a.npz'
  np.savez(path, **arrays())
  path.write_bytes(damage(path.read_bytes()))
  with refused(f'{path} holds no arrays x and y: '):
    data.open_source(str(path), 'train', 10)


@pytest.mark.parametrize('name', ['x', 'y'])
def test_arrays_never_run_what_they_hold(tmp_path, name):
  class Trap:
    def __reduce__(self):
      return os.mkdir, (str(tmp_path / 'sprung'),)

  path = tmp_path / 'a.npz'
  np.savez(path, **arrays(**{name: np.asarray([Trap()], object)}))
  with refused('Object arrays cannot be loaded'):
    data.open_source(str(path), 'train', 10)
  assert not (tmp_path / 'sprung').exists()
  with np.load(path, allow_pickle=True) as stored:
    assert stored[name].shape == (1,)
  assert (tmp_path / 'sprung').exists()


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
      assert digest == hashlib.sha256(content).digest()[:16]
      with PIL.Image.open(io.BytesIO(content)) as image:
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


def write_tar(path, files):
  with tarfile.open(path, 'w') as tar:
    for name, content in files.items():
      entry = tarfile.TarInfo(name)
      entry.size = len(content)
      tar.addfile(entry, io.BytesIO(content))


def write_training_tar(folder):
  """ImageNet's, of one image in one class."""
  need_tensorflow()
  inner = folder / 'n01443537.tar'
  write_tar(inner, {'n01443537_7.JPEG': jpeg(7)})
  path = folder / 'ILSVRC2012_img_train.tar'
  write_tar(path, {inner.name: inner.read_bytes()})
  inner.unlink()


def validation_files(count):
  return {f'ILSVRC2012_val_{i:08}.JPEG': jpeg(i) for i in range(1, 1 + count)}


def test_both_tars_make_both_splits(tmp_path, monkeypatch):
  write_training_tar(tmp_path)
  write_tar(tmp_path / 'ILSVRC2012_img_val.tar', validation_files(3))
  monkeypatch.setattr(data, 'VALIDATION_COUNT', 3)
  out = tmp_path / 'out'
  folder = data.prepare('imagenet2012', str(out), str(tmp_path))
  assert folder == out / 'imagenet2012' / '5.1.0'
  (train,) = read(out, 'train')
  assert (train.label, train.content()) == (1, jpeg(7))
  found = {e.content(): e.label for e in read(out, 'validation')}
  # The first of the official list, n01751748, n09193705 and n02105855.
  assert found == {jpeg(1): 65, jpeg(2): 970, jpeg(3): 230}


def test_the_training_tar_is_enough(tmp_path):
  write_training_tar(tmp_path)
  data.prepare('imagenet2012', str(tmp_path / 'out'), str(tmp_path))
  one, other = (
    data.open_source(str(tmp_path / 'out'), role, 1000)
    for role in ('train', 'validation')
  )
  assert one.identity == other.identity
  assert [e.label for e in one.examples(0)] == [1]
  # All classes have a name, but one alone has an image.
  assert list(images.draw(one, 0, [1], 0))


@pytest.mark.parametrize(
  ('name', 'tars', 'words'),
  [
    ('no_such_data', {}, "TFDS has no data set 'no_such_data'"),
    ('imagenet2012', None, 'name their folder with --tars'),
    ('imagenet2012', {}, 'there is no .*/ILSVRC2012_img_train.tar'),
    ('imagenet2012', {'train': b'no tar'}, 'cannot prepare imagenet2012: '),
    (
      'imagenet2012',
      {'train': b'', 'val': b'no tar'},
      '/ILSVRC2012_img_val.tar',
    ),
    (
      'imagenet2012',
      {'train': b'', 'val': validation_files(3)},
      '_val.tar holds 3 images; .* 50,000 .* name it with --validation',
    ),
  ],
)
def test_what_cannot_be_prepared(tmp_path, name, tars, words):
  need_tensorflow()
  for part, content in (tars or {}).items():
    path = tmp_path / f'ILSVRC2012_img_{part}.tar'
    if isinstance(content, dict):
      write_tar(path, content)
    else:
      path.write_bytes(content)
  folder = None if tars is None else str(tmp_path)
  with refused(words):
    data.prepare(name, str(tmp_path / 'out'), folder)
  assert not list(tmp_path.rglob('dataset_info.json'))


def test_preparing_needs_tensorflow(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'tensorflow', None)
  with refused(r"'nemo_jax\[tensorflow]'"):
    data.prepare('imagenet2012', str(tmp_path), str(tmp_path))
