"""Labelled images of TFDS data sets, class folders and arrays.

A source hands out its examples in an order that a seed fixes, still encoded;
`images.load` draws samples from it and decodes them.
"""

import functools
import os
import pathlib
import tarfile
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from nemo_jax.base import InputError

# What may serve for each role, the best first. Where training images alone are
# to be had, the caller divides them.
SPLITS = {
  'train': ('train',),
  'validation': ('validation', 'val', 'test', 'train'),
}
SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.ppm', '.webp')
TARS = ('train', 'val')
VALIDATION_COUNT = 50_000
# What can be read at random, and so without TensorFlow.
_RANDOM_ACCESS = ('array_record', 'parquet')


class Example(NamedTuple):
  """One labelled image."""

  key: str  # what messages call it
  label: int
  content: Callable[[], bytes | np.ndarray]  # an encoded file, or pixels


class Source(NamedTuple):
  """Labelled images somewhere."""

  name: str
  identity: str  # differs when the content does
  size: int
  classes: dict[int, str]  # the names of the labels that there are
  examples: Callable[[int], Iterator[Example]]  # (seed) -> in random order


def first_line(error: Exception) -> str:
  """What an error says, on one line, or else its kind."""
  return (str(error).strip().splitlines() or [type(error).__name__])[0]


@functools.cache
def imagenet_classes() -> dict[str, int]:
  """The label of each of ImageNet's 1,000 WordNet ids, as in torchvision."""
  path = tfds.core.tfds_path('datasets/imagenet2012/labels.txt')
  return {name: i for i, name in enumerate(path.read_text().split())}


def _labels(names: Sequence[str], num_classes: int, where: str) -> list[int]:
  """The network's label for each name of a class.

  ImageNet's are known by their WordNet ids, so that a part of them will do;
  others count in the order given.

  Raises:
    InputError: there are not as many as the network has.
  """
  known = imagenet_classes()
  if num_classes == len(known):
    unknown = [name for name in names if name not in known]
    if not unknown:
      return [known[name] for name in names]
    if len(names) != num_classes:
      raise InputError(
        f'{where} has the class {unknown[0]!r}, which is no WordNet id of '
        'ImageNet such as n01440764'
      )
  if len(names) != num_classes:
    raise InputError(
      f'{where} has {len(names)} classes; the network has {num_classes}'
    )
  return list(range(num_classes))


def _shuffled(count: int, seed: int) -> np.ndarray:
  return np.random.default_rng(seed).permutation(count)


def _from_folders(path: pathlib.Path, num_classes: int) -> Source:
  """A folder for each class, as torchvision's ImageFolder reads them.

  Its identity is made from the times at which images came and went; one that
  is written over in place goes unnoticed.
  """
  folders = sorted(
    x for x in path.iterdir() if x.is_dir() and not x.name.startswith('.')
  )
  if not folders and num_classes == len(imagenet_classes()):
    raise InputError(f'{path} holds no folder for any class')
  labels = _labels([f.name for f in folders], num_classes, str(path))
  files, stamps = [], []
  for label, folder in zip(labels, folders, strict=True):
    stamps.append((folder.name, folder.stat().st_mtime_ns))
    inside = sorted(
      x
      for x in os.listdir(folder)
      if x.lower().endswith(SUFFIXES) and not x.startswith('.')
    )
    if not inside:
      raise InputError(
        f'{folder} holds no image; known are {", ".join(SUFFIXES)}'
      )
    files += [(label, folder / name) for name in inside]

  def examples(seed):
    for i in _shuffled(len(files), seed):
      label, file = files[i]
      yield Example(str(file), label, file.read_bytes)

  return Source(
    name=str(path),
    identity=f'{path.resolve()} {stamps}',
    size=len(files),
    classes={i: f.name for i, f in zip(labels, folders, strict=True)},
    examples=examples,
  )


def _from_arrays(path: pathlib.Path, num_classes: int) -> Source:
  """An .npz with pixels `x` uint8[B, H, W, 3] and labels `y`."""
  try:
    with np.load(path, allow_pickle=False) as stored:
      pixels, labels = stored['x'], np.asarray(stored['y']).ravel()
  except Exception as error:  # zipfile, zlib and NumPy raise many kinds
    reason = first_line(error)
    raise InputError(f'{path} holds no arrays x and y: {reason}') from error
  if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3:
    raise InputError(
      f'{path}: x is {pixels.dtype}{list(pixels.shape)}; pixels are '
      'uint8[B, H, W, 3]'
    )
  if len(labels) != len(pixels) or not np.issubdtype(labels.dtype, np.integer):
    raise InputError(
      f'{path}: y is {labels.dtype}[{len(labels)}]; there are {len(pixels)} '
      'images, with a whole number each'
    )
  if not len(labels):
    raise InputError(f'{path} holds no image')
  if labels.min() < 0 or labels.max() >= num_classes:
    culprit = labels.min() if labels.min() < 0 else labels.max()
    raise InputError(
      f'{path} has the label {culprit}; the network has {num_classes} classes'
    )

  def examples(seed):
    for i in _shuffled(len(labels), seed):
      yield Example(f'{path}[{i}]', int(labels[i]), lambda i=i: pixels[i])

  stat = path.stat()
  return Source(
    name=str(path),
    identity=f'{path.resolve()} {stat.st_size} {stat.st_mtime_ns}',
    size=len(labels),
    classes={int(label): str(label) for label in np.unique(labels)},
    examples=examples,
  )


def _random_access(builder, split, decoders, format_, read) -> Callable:
  source = builder.as_data_source(
    split=split, decoders=decoders, file_format=format_
  )

  def examples(seed):
    for i in _shuffled(len(source), seed):
      yield read(source[i], lambda i=i: source[i])

  return examples


def _sequential(builder, split, decoders, read) -> Callable:
  """TFRecords can be read from end to end alone, and by TensorFlow alone.

  TFDS has shuffled them when it wrote them; here the files are, so that the
  seed says nothing where there is one file.
  """
  try:
    import tensorflow as tf
  except ImportError as error:
    raise InputError(
      f'{builder.data_dir} holds TFRecords, which TensorFlow reads: pip '
      "install 'nemo_jax[tensorflow]', or prepare the data as array_record"
    ) from error
  tf.config.set_visible_devices([], 'GPU')  # they are for JAX

  def examples(seed):
    config = tfds.ReadConfig(
      shuffle_seed=seed, try_autocache=False, interleave_cycle_length=1
    )
    records = builder.as_dataset(
      split=split, decoders=decoders, read_config=config, shuffle_files=True
    )
    for record in records.as_numpy_iterator():
      yield read(record, lambda record=record: record)

  return examples


def _from_tfds(builder, role: str, num_classes: int) -> Source:
  """A split of a prepared TFDS data set."""
  where = pathlib.Path(builder.data_dir).resolve()
  splits = builder.info.splits
  split = next((name for name in SPLITS[role] if name in splits), None)
  if split is None:
    # Some, such as imagenet_v2, are for testing alone.
    raise InputError(
      f'{where} has no split train; the choices are {", ".join(splits)}'
    )
  features = builder.info.features
  image, label = builder.info.supervised_keys or ('image', 'label')
  if label not in features or not isinstance(
    features[label], tfds.features.ClassLabel
  ):
    raise InputError(f'{where} is no classification: it has no class labels')
  names = features[label].names
  labels = _labels(names, num_classes, str(where))

  def read(record, again):
    number = int(record[label])
    if number < 0:
      raise InputError(f'the split {split} of {where} has no labels')
    key = record.get('file_name', f'an image in {split}')
    key = key.decode() if isinstance(key, bytes) else key
    return Example(f'{where}: {key}', labels[number], lambda: again()[image])

  decoders = {image: tfds.decode.SkipDecoding()}
  formats = [f.value for f in builder.info.available_file_formats()]
  direct = next((f for f in _RANDOM_ACCESS if f in formats), None)
  if direct:
    examples = _random_access(builder, split, decoders, direct, read)
  else:
    examples = _sequential(builder, split, decoders, read)
  count = splits[split].num_examples
  written = (where / 'dataset_info.json').stat().st_mtime_ns
  return Source(
    name=f'{builder.info.full_name} {split}',
    identity=f'{where} {split} {count} {written}',
    size=count,
    classes=dict(zip(labels, names, strict=True)),
    examples=examples,
  )


def _prepared_below(path: pathlib.Path) -> list[pathlib.Path]:
  """Folders of prepared TFDS data sets: name/config/version at the deepest."""
  patterns = ('', '*/', '*/*/', '*/*/*/')
  found = [f for p in patterns for f in path.glob(f'{p}dataset_info.json')]
  return [f.parent for f in found]


def _builder(name: str, **options) -> tfds.core.DatasetBuilder:
  try:
    return tfds.builder(name, **options)
  except Exception as error:  # TFDS raises many kinds, over many lines
    reason = first_line(error)
    raise InputError(f'TFDS has no data set {name!r}: {reason}') from error


def _open_tfds(name: str) -> tfds.core.DatasetBuilder:
  builder = _builder(name)
  if not builder.info.splits:
    raise InputError(
      f'{name} is not prepared in {builder.data_dir}; run python -m '
      f'experiments.prepare --dataset={name}'
    )
  return builder


def open_source(where: str, role: str, num_classes: int) -> Source:
  """The images at a place, for one of two roles.

  Args:
    where: `tfds:NAME`, in TFDS's default folder or `TFDS_DATA_DIR`; a folder
      with a prepared TFDS data set in it; a folder of class folders, or one
      with such folders in `train` and `val`; or an .npz with `x` and `y`.
    role: `train`, or `validation`.
    num_classes: of the network.

  Returns:
    The images; for both roles the same ones, with one identity, where there
    are no others.

  Raises:
    InputError: there is nothing of the kind, or its classes do not fit.
  """
  if where.startswith('tfds:'):
    builder = _open_tfds(where.removeprefix('tfds:'))
    return _from_tfds(builder, role, num_classes)
  path = pathlib.Path(where)
  if not path.exists():
    raise InputError(f'there is no {path}')
  if path.suffix == '.npz':
    return _from_arrays(path, num_classes)
  if not path.is_dir():
    raise InputError(f'{path} is neither a folder nor an .npz')
  prepared = _prepared_below(path)
  if len(prepared) > 1:
    names = ', '.join(str(p.relative_to(path)) for p in sorted(prepared))
    raise InputError(f'{path} has several data sets; name one: {names}')
  if prepared:
    builder = tfds.builder_from_directory(prepared[0])
    return _from_tfds(builder, role, num_classes)
  inside = [path / name for name in SPLITS[role] if (path / name).is_dir()]
  if inside:
    return _from_folders(inside[0], num_classes)
  if any((path / name).is_dir() for name in SPLITS['validation']):
    raise InputError(f'{path} has no folder train')
  if any(path.glob('*.tar')):
    raise InputError(
      f'{path} holds tars; prepare them first: python -m experiments.prepare '
      f'--tars={path} --data=FOLDER'
    )
  if not any(x.is_dir() for x in path.iterdir()):
    raise InputError(
      f'{path} holds neither a TFDS data set nor a folder for each class'
    )
  return _from_folders(path, num_classes)


def _check_tars(folder: pathlib.Path) -> None:
  """Raises `InputError` for tars of ImageNet that would be misread."""
  train, validation = (folder / f'ILSVRC2012_img_{x}.tar' for x in TARS)
  if not train.is_file():
    raise InputError(f'there is no {train}')
  if validation.is_file():
    try:
      with tarfile.open(validation) as tar:
        count = len(tar.getnames())
    except (tarfile.TarError, EOFError) as error:
      reason = first_line(error)
      raise InputError(f'{validation} is no tar: {reason}') from error
    # TFDS labels these images by their place among all of them.
    if count != VALIDATION_COUNT:
      raise InputError(
        f'{validation} holds {count:,} images; labels are known of all '
        f'{VALIDATION_COUNT:,} alone. Keep a part of them as a folder of class '
        'folders, and name it with --validation'
      )


def prepare(
  name: str, folder: str | None = None, tars: str | None = None
) -> pathlib.Path:
  """Writes a TFDS data set as array_record, which is read at random.

  Args:
    name: in the catalogue of TFDS.
    folder: where to; TFDS's default if absent.
    tars: folder of what has to be downloaded by hand. For `imagenet2012` the
      training images are enough.

  Raises:
    InputError: TensorFlow is not installed, the name is unknown, or the tars
      cannot be used.
  """
  try:
    import importlib_resources  # noqa: F401, which TFDS wants but does not name
    import tensorflow  # noqa: F401
  except ImportError as error:
    raise InputError(
      "preparing data needs TensorFlow: pip install 'nemo_jax[tensorflow]'"
    ) from error
  builder = _builder(name, data_dir=folder, file_format='array_record')
  if name.split('/')[0].split(':')[0] == 'imagenet2012':
    if tars is None:
      raise InputError(
        'imagenet2012 is made from ILSVRC2012_img_train.tar and, if there, '
        'ILSVRC2012_img_val.tar; name their folder with --tars'
      )
    where = pathlib.Path(tars)
    _check_tars(where)
    if not (where / 'ILSVRC2012_img_val.tar').exists():
      # The builder insists on both tars.
      train = str(where / 'ILSVRC2012_img_train.tar')
      builder._split_generators = lambda manager: {
        'train': builder._generate_examples(manager.iter_archive(train))
      }
  config = tfds.download.DownloadConfig(manual_dir=tars)
  try:
    builder.download_and_prepare(download_config=config)
  except Exception as error:
    reason = first_line(error)
    raise InputError(f'TFDS cannot prepare {name}: {reason}') from error
  return pathlib.Path(builder.data_dir)
