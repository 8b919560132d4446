"""Sources of labelled images: TFDS data sets, class folders and arrays.

A source yields its examples, still encoded, in an order that depends on a seed;
`images.samples` draws from it and decodes.
"""

import pathlib

from nemo_jax.core import files
from nemo_jax.core.types import InputError
from nemo_jax.data.arrays import from_arrays
from nemo_jax.data.folders import from_folders
from nemo_jax.data.prepared import from_tfds, open_folder, open_name, prepare
from nemo_jax.data.source import (
  SPLITS,
  Example,
  Source,
  check_same_classes,
  imagenet_classes,
)

__all__ = [
  'Example',
  'Source',
  'check_same_classes',
  'imagenet_classes',
  'open_source',
  'prepare',
]


def _prepared_below(path: pathlib.Path) -> list[pathlib.Path]:
  """Folders of prepared TFDS data sets, up to name/config/version below."""
  patterns = ('', '*/', '*/*/', '*/*/*/')
  found = [f for p in patterns for f in path.glob(f'{p}dataset_info.json')]
  return [f.parent for f in found]


def _class_folders(path: pathlib.Path, role: str) -> pathlib.Path:
  """The folder that holds a folder for each class.

  Raises:
    InputError: there is none.
  """
  inside = [path / name for name in SPLITS[role] if (path / name).is_dir()]
  if inside:
    return inside[0]
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
  return path


def open_source(where: str, role: str, num_classes: int) -> Source:
  """Source of the labelled images that a name or path stands for.

  Args:
    where: `tfds:NAME`, in TFDS's default folder or `TFDS_DATA_DIR`; a folder
      with a prepared TFDS data set in it; a folder of class folders, or one
      with such folders in `train` and `val` (or `validation`, `valid`, `test`);
      or an .npz with `x` and `y`.
    role: `train` or `validation`, the split that is taken. Data without splits
      are the same source, with the same identity, in both roles.
    num_classes: of the network.

  Raises:
    InputError: there are no such data, or their classes do not fit the network.
  """
  if where.startswith('tfds:'):
    builder = open_name(where.removeprefix('tfds:'))
    return from_tfds(builder, role, num_classes)
  path = files.local(where)
  with files.errors_named(path):
    if not path.exists():
      raise InputError(f'there is no {path}')
    if path.suffix.lower() == '.npz' and not path.is_dir():
      return from_arrays(path, num_classes)
    if not path.is_dir():
      raise InputError(f'{path} is neither a folder nor an .npz')
    prepared = _prepared_below(path)
    if len(prepared) > 1:
      names = ', '.join(str(p.relative_to(path)) for p in sorted(prepared))
      raise InputError(f'{path} has several data sets; name one: {names}')
    if prepared:
      return from_tfds(open_folder(prepared[0]), role, num_classes)
    return from_folders(_class_folders(path, role), num_classes)
