"""Source of a prepared TFDS data set, and the preparation of one."""

import contextlib
import hashlib
import pathlib
import tarfile
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any

import tensorflow_datasets as tfds

from nemo_jax.core.types import InputError, first_line
from nemo_jax.data.source import (
  SPLITS,
  Example,
  Source,
  labels_of,
  shuffled,
  stamp,
)

TARS = ('train', 'val')
VALIDATION_COUNT = 50_000
# File formats with random access, which need no TensorFlow.
_RANDOM_ACCESS = ('array_record', 'parquet')

# From a record, and a function that reads it again, to an example.
Read = Callable[[Mapping[str, Any], Callable[[], Any]], Example]
Examples = Callable[[int], Iterator[Example]]  # see `Source`


@contextlib.contextmanager
def _errors_of(where: str | pathlib.Path) -> Generator[None]:
  """Context that turns any error of TFDS into an `InputError`."""
  try:
    yield
  except InputError:
    raise
  except Exception as error:  # TFDS and its readers raise many kinds
    raise InputError(f'cannot read {where}: {first_line(error)}') from error


def _random_access(
  builder: tfds.core.DatasetBuilder,
  split: str,
  decoders: dict,
  format_: str,
  read: Read,
) -> Examples:
  """`Source.examples` of a data set in a format with random access."""
  with _errors_of(builder.data_dir):
    source = builder.as_data_source(
      split=split, decoders=decoders, file_format=format_
    )

  def examples(seed: int) -> Iterator[Example]:
    for i in shuffled(len(source), seed):
      with _errors_of(builder.data_dir):
        record = source[i]
      yield read(record, lambda i=i: source[i])

  return examples


def _sequential(
  builder: tfds.core.DatasetBuilder, split: str, decoders: dict, read: Read
) -> Examples:
  """`Source.examples` of a data set of TFRecords, which TensorFlow reads.

  TFRecords are read from end to end. TFDS shuffled the records when it wrote
  them; the seed shuffles the files, so it has no effect if there is one file.
  """
  try:
    import tensorflow as tf
  except ImportError as error:
    raise InputError(
      f'{builder.data_dir} holds TFRecords, which TensorFlow reads: pip '
      "install 'nemo_jax[tensorflow]', or prepare the data as array_record"
    ) from error
  tf.config.set_visible_devices([], 'GPU')  # JAX uses the GPUs

  def examples(seed: int) -> Iterator[Example]:
    config = tfds.ReadConfig(
      shuffle_seed=seed, try_autocache=False, interleave_cycle_length=1
    )
    with _errors_of(builder.data_dir):
      records = builder.as_dataset(
        split=split, decoders=decoders, read_config=config, shuffle_files=True
      )
      for record in records.as_numpy_iterator():
        yield read(record, lambda record=record: record)

  return examples


def from_tfds(
  builder: tfds.core.DatasetBuilder, role: str, num_classes: int
) -> Source:
  """Source of the images in a split of a prepared TFDS data set.

  Args:
    builder: of the data set.
    role: `train` or `validation`.
    num_classes: of the network.

  Raises:
    InputError: there is no such split, or the data set has no class labels or
      other classes than the network.
  """
  where = pathlib.Path(builder.data_dir).resolve()
  splits = builder.info.splits
  split = next((name for name in SPLITS[role] if name in splits), None)
  if split is None:
    # Some data sets, such as imagenet_v2, have test images only.
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
  labels = labels_of(names, num_classes, str(where))

  def read(record: Mapping[str, Any], again: Callable[[], Any]) -> Example:
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
  sha = hashlib.sha256()
  for file in sorted(where.iterdir()):
    sha.update(stamp(file.name, file.stat()))
  return Source(
    name=f'{builder.info.full_name} {split}',
    identity=f'{where} {split} {sha.hexdigest()}',
    size=count,
    classes=dict(zip(labels, names, strict=True)),
    examples=examples,
  )


def _builder(name: str, **options: Any) -> tfds.core.DatasetBuilder:
  """The builder of a name in TFDS's catalogue."""
  try:
    return tfds.builder(name, **options)
  except Exception as error:  # TFDS raises many kinds, over many lines
    reason = first_line(error)
    raise InputError(f'TFDS has no data set {name!r}: {reason}') from error


def open_name(name: str) -> tfds.core.DatasetBuilder:
  """The prepared data set of that name in TFDS's default folder.

  Raises:
    InputError: TFDS does not know the name, or the data set is not prepared.
  """
  builder = _builder(name)
  if not builder.info.splits:
    raise InputError(
      f'{name} is not prepared in {builder.data_dir}; run python -m '
      f'experiments.prepare --dataset={name}'
    )
  return builder


def open_folder(folder: pathlib.Path) -> tfds.core.DatasetBuilder:
  """The prepared data set in a folder.

  Raises:
    InputError: the folder is damaged.
  """
  with _errors_of(folder):
    return tfds.builder_from_directory(folder)


def _check_tars(folder: pathlib.Path) -> None:
  """Raises `InputError` for tars of ImageNet that TFDS would misread."""
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
    # TFDS labels these images by their position among all 50,000.
    if count != VALIDATION_COUNT:
      raise InputError(
        f'{validation} holds {count:,} images; labels are known of all '
        f'{VALIDATION_COUNT:,} alone. Keep a part of them as a folder of class '
        'folders, and name it with --validation'
      )


def prepare(
  name: str, folder: str | None = None, tars: str | None = None
) -> pathlib.Path:
  """Writes a TFDS data set as array_record, which has random access.

  Args:
    name: in the catalogue of TFDS.
    folder: where it is written; TFDS's default folder if None.
    tars: folder with files that have to be downloaded by hand. For
      `imagenet2012` the training images are enough.

  Returns:
    The folder of the prepared data set.

  Raises:
    InputError: TensorFlow is not installed, the name is unknown, or the tars
      cannot be used.
  """
  try:
    # TFDS needs it but does not depend on it.
    import importlib_resources  # noqa: F401
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
      # The builder reads both tars; this makes it read the one that is there.
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
