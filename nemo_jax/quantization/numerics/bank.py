"""What was prepared for every quantizer and bit-width, and files of it."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence

import flax.struct
import jax.numpy as jnp
import numpy as np

from nemo_jax.core import files
from nemo_jax.core.types import Array, InputError
from nemo_jax.quantization.numerics.ranges import Range
from nemo_jax.quantization.numerics.widths import CODED, WIDTHS
from nemo_jax.quantization.trace.analysis import Site


@flax.struct.dataclass
class Bank:
  """Ranges of all quantizers; and more of those that were reconstructed.

  A weight that has no codes here is rounded to nearest when it is needed.

  Attributes:
    ranges: one for each quantizer.
    codes: of weights, int8[K, ...], less the zero point: a row for each of
      `widths.CODED`.
    shifts: float32[K, ...], added to the product of a weight; laid out as its
      scale.
    equalizers: what an operand is multiplied by before it is quantized: one
      over that of the weight it meets for an activation, so that the product is
      the same.
  """

  ranges: tuple[Range, ...]
  codes: dict[Site, Array] = dataclasses.field(default_factory=dict)
  shifts: dict[Site, Array] = dataclasses.field(default_factory=dict)
  equalizers: dict[Site, Array] = dataclasses.field(default_factory=dict)


# Fields by site, with the types of their arrays.
_BY_SITE = {
  'codes': np.int8,
  'shifts': np.float32,
  'equalizers': np.float32,
}


def columns_of(bank: Bank) -> dict[str, np.ndarray]:
  """The arrays of a bank by name, as files hold them."""
  columns = {
    f'ranges/{i}/{name}': column
    for i, table in enumerate(bank.ranges)
    for name, column in table._asdict().items()
  }
  for field in _BY_SITE:
    for site, array in getattr(bank, field).items():
      columns[f'{field}/{json.dumps(site)}'] = array
  return {name: np.asarray(x) for name, x in columns.items()}


def _check(name: str, array: np.ndarray, dtype, rows: int | None) -> None:
  """Raises `InputError` unless it has the type and rows, and finite values."""
  if array.dtype != dtype:
    raise InputError(f'{name} is {array.dtype}, not {np.dtype(dtype)}')
  if rows is not None and array.shape[:1] != (rows,):
    raise InputError(f'{name} has shape {array.shape}, not {rows} rows')
  if not np.all(np.isfinite(array)):
    raise InputError(f'{name} holds values that are not finite')


def _range(index: int, columns: dict[str, np.ndarray]) -> Range:
  """Takes the range of a quantizer from the columns."""
  found = {}
  for field in Range._fields:
    name = f'ranges/{index}/{field}'
    if name not in columns:
      raise InputError(f'there is no {name}')
    found[field] = columns.pop(name)
    _check(name, found[field], np.float32, len(WIDTHS))
  table = Range(**found)
  if table.scale.shape != table.zero_point.shape or not np.all(table.scale > 0):
    raise InputError(f'ranges/{index} has scales that are not positive')
  return Range(*map(jnp.asarray, table))


def _site(name: str, text: str) -> Site:
  try:
    return Site(*json.loads(text))
  except (TypeError, ValueError, RecursionError) as error:
    raise InputError(f'{name} is of no site') from error


def from_columns(columns: Mapping[str, np.ndarray]) -> Bank:
  """The bank that `columns_of` took apart.

  Raises:
    InputError: a column is unknown, missing, or of another type or shape.
  """
  rest, ranges, fields = dict(columns), [], {field: {} for field in _BY_SITE}
  # There is a range for every index up to the first that has none.
  while any(f'ranges/{len(ranges)}/{f}' in rest for f in Range._fields):
    ranges.append(_range(len(ranges), rest))
  for name, array in rest.items():
    field, _, text = name.partition('/')
    if field not in fields:
      raise InputError(f'{name} is no column of a bank of {len(ranges)} ranges')
    rows = None if field == 'equalizers' else len(CODED)
    _check(name, array, _BY_SITE[field], rows)
    fields[field][_site(name, text)] = jnp.asarray(array)
  return Bank(tuple(ranges), **fields)


def check_fits(bank: Bank, own: Bank, sites: Sequence[Site]) -> None:
  """Raises `InputError` unless a bank is of the same network as `own`.

  Args:
    bank: to be checked.
    own: another bank of the network.
    sites: of the network.
  """
  shapes = lambda bank: [[x.shape for x in table] for table in bank.ranges]
  if shapes(bank) != shapes(own):
    raise InputError('its ranges are of another network')
  strange = {s for field in _BY_SITE for s in getattr(bank, field)} - {*sites}
  if strange or bank.codes.keys() != bank.shifts.keys():
    raise InputError('its sites are those of another network')


def save(path: str | os.PathLike, bank: Bank) -> None:
  """Writes a bank as one .npz with its digest."""
  files.write_arrays(path, columns_of(bank))


def load(path: str | os.PathLike) -> Bank:
  """Reads what `save` wrote.

  Raises:
    InputError: the file is damaged, cannot be read, or holds no bank.
  """
  columns = files.read_arrays(path)
  try:
    return from_columns(columns)
  except InputError as error:
    raise InputError(f'{path} holds no bank: {error}') from error
