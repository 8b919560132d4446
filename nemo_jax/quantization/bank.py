"""What was prepared for every quantizer and bit-width, and files of it."""

import os
import pathlib
import zipfile
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from nemo_jax.base import Array, InputError
from nemo_jax.quantization import calibrate
from nemo_jax.quantization.analysis import Site

# Widths that there are codes for; wider ones are rounded when needed.
WIDTHS = tuple(range(2, 9))


class Bank(NamedTuple):
  """Ranges of all quantizers; and more of those that were reconstructed.

  A weight that has no codes here is rounded to nearest when it is needed.
  """

  ranges: tuple[calibrate.Range, ...]  # one a quantizer
  # Of weights, [K, ...] int8, less the zero point: a row for each of WIDTHS.
  codes: dict[Site, Array] = {}
  # [K, ...] float32, added to the product of a weight; laid out as its scale.
  shifts: dict[Site, Array] = {}
  # What an operand is multiplied by before it is quantized: one over that of
  # the weight it meets for an activation, so that the product is the same.
  equalizers: dict[Site, Array] = {}


def save(path: str | os.PathLike, bank: Bank) -> None:
  """Writes a bank as one .npz; a kill leaves no half of it."""
  columns = {
    f'ranges/{i}/{name}': column
    for i, table in enumerate(bank.ranges)
    for name, column in table._asdict().items()
  }
  for field in ('codes', 'shifts', 'equalizers'):
    for site, array in getattr(bank, field).items():
      columns['/'.join([field, *map(str, site)])] = array
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  draft = path.with_name(f'.{path.name}.draft.npz')
  np.savez(draft, **{name: np.asarray(x) for name, x in columns.items()})
  os.replace(draft, path)


def load(path: str | os.PathLike) -> Bank:
  """Reads what `save` wrote.

  Raises:
    InputError: the file is damaged or cannot be read.
  """
  try:
    with np.load(path, allow_pickle=False) as file:
      columns = {name: jnp.asarray(file[name]) for name in file.files}
  except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
    raise InputError(f'cannot read {path}: {error}; delete it') from error
  ranges, fields = {}, {'codes': {}, 'shifts': {}, 'equalizers': {}}
  for name, array in columns.items():
    field, *rest = name.split('/')
    if field == 'ranges':
      index, column = rest
      ranges.setdefault(int(index), {})[column] = array
    else:
      fields[field][Site(*map(int, rest))] = array
  tables = [calibrate.Range(**ranges[i]) for i in range(len(ranges))]
  return Bank(tuple(tables), **fields)
