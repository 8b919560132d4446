"""Banks: ranges, codes and shifts of all quantizers at all bit-widths."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import jax.numpy as jnp
import numpy as np

from nemo_jax.core import files
from nemo_jax.core.types import InputError
from nemo_jax.quantization.numerics.ranges import Range
from nemo_jax.quantization.numerics.widths import CODED, WIDTHS
from nemo_jax.quantization.trace.analysis import Site


@flax.struct.dataclass
class Bank:
  """Ranges of all quantizers, and what reconstruction found for weights.

  A weight without codes here is rounded to nearest when the network is encoded.

  Attributes:
    ranges: N `Range`s, one for each quantizer.
    codes: {site: int8[K, ...]}, codes of weights minus the zero point; a row in
      the shape of the weight for each of the K widths `widths.CODED`.
    shifts: {site: float32[K, ...]}, what is added to the product of a weight; a
      row in the shape of its scale for each of these widths.
    equalizers: {site: float32[...]}, what an operand is multiplied by before it
      is quantized. The factor of an activation is one over that of the weight
      that it is multiplied with, so the product does not change.
  """

  ranges: tuple[Any, ...]
  codes: dict[Any, Any] = dataclasses.field(default_factory=dict)
  shifts: dict[Any, Any] = dataclasses.field(default_factory=dict)
  equalizers: dict[Any, Any] = dataclasses.field(default_factory=dict)


# Fields that are stored by site, with the types of their arrays.
_BY_SITE = {
  'codes': np.int8,
  'shifts': np.float32,
  'equalizers': np.float32,
}


def columns_of(bank: Bank) -> dict[str, np.ndarray]:
  """The arrays of a bank by name, as files store them."""
  columns: dict[str, Any] = {
    f'ranges/{i}/{name}': column
    for i, table in enumerate(bank.ranges)
    for name, column in table._asdict().items()
  }
  for field in _BY_SITE:
    for site, array in getattr(bank, field).items():
      columns[f'{field}/{json.dumps(site)}'] = array
  return {name: np.asarray(x) for name, x in columns.items()}


def _check(name: str, array: np.ndarray, dtype: Any, rows: int | None) -> None:
  """Raises `InputError` unless type, number of rows and values are valid."""
  if array.dtype != dtype:
    raise InputError(f'{name} is {array.dtype}, not {np.dtype(dtype)}')
  if rows is not None and array.shape[:1] != (rows,):
    raise InputError(f'{name} has shape {array.shape}, not {rows} rows')
  if not np.all(np.isfinite(array)):
    raise InputError(f'{name} holds values that are not finite')


def _range(index: int, columns: dict[str, np.ndarray]) -> Range:
  """The range of a quantizer, whose columns are removed from `columns`."""
  found = {}
  for field in Range._fields:
    name = f'ranges/{index}/{field}'
    if name not in columns:
      raise InputError(f'there is no {name}')
    found[field] = columns.pop(name)
    _check(name, found[field], np.float32, len(WIDTHS))
  scale, zero_point = found['scale'], found['zero_point']
  if scale.shape != zero_point.shape:
    raise InputError(
      f'ranges/{index} has scales of shape {scale.shape}, zero points of shape '
      f'{zero_point.shape}'
    )
  if not np.all(scale > 0):
    raise InputError(f'ranges/{index} has scales that are not positive')
  return Range(jnp.asarray(scale), jnp.asarray(zero_point))


def _site(name: str, text: str) -> Site:
  """The site that a column's name gives as JSON."""
  try:
    return Site(*json.loads(text))
  except (TypeError, ValueError, RecursionError) as error:
    raise InputError(f'{name} is of no site: not three JSON values') from error


def from_columns(columns: Mapping[str, np.ndarray]) -> Bank:
  """The bank of some columns; the inverse of `columns_of`.

  Raises:
    InputError: a column is unknown, missing, or of another type or shape.
  """
  rest, ranges, fields = dict(columns), [], {field: {} for field in _BY_SITE}
  # Ranges are numbered from 0 without gaps.
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


def check_fits(
  bank: Bank,
  own: Bank | None,
  sites: Sequence[Site],
  weights: Mapping[Site, Any] | None = None,
) -> None:
  """Raises `InputError` unless a bank fits a network.

  Args:
    bank: what is checked.
    own: another bank of the network, whose ranges have the same shapes; None if
      there is none, then only the number of ranges is checked.
    sites: all sites of the network.
    weights: its quantized weights or their shapes, by site, such as
      `jax.eval_shape(quantized.weights, variables)`; if given, codes and shifts
      have to fit them.
  """
  shapes = lambda bank: [[x.shape for x in table] for table in bank.ranges]
  if own is None:
    fits = len(bank.ranges) == 1 + max(site.quantizer for site in sites)
  else:
    fits = shapes(bank) == shapes(own)
  if not fits:
    raise InputError('its ranges are of another network')
  strange = {s for field in _BY_SITE for s in getattr(bank, field)} - {*sites}
  if weights is not None:
    strange |= bank.codes.keys() - weights.keys()
  if strange or bank.codes.keys() != bank.shifts.keys():
    raise InputError('its sites are those of another network')
  if weights is not None:
    for site in bank.codes:
      _check_shapes(bank, site, tuple(weights[site].shape))


def _check_shapes(bank: Bank, site: Site, shape: tuple[int, ...]) -> None:
  """Raises `InputError` unless codes and shifts fit a weight's shape.

  Codes have its shape at every width. Shifts have that of its scale, in which
  an axis has the size of the weight's or 1, or there is a single scale.
  """
  codes, shift = bank.codes[site].shape[1:], bank.shifts[site].shape[1:]
  scale = bank.ranges[site.quantizer].scale.shape[1:]
  spread = len(shift) == len(shape) and all(
    size in (1, whole) for size, whole in zip(shift, shape, strict=True)
  )
  found = {
    'codes': (codes, codes == shape),
    'shifts': (shift, shift == scale and (spread or not shift)),
  }
  for field, (given, fits) in found.items():
    if not fits:
      raise InputError(
        f'its {field} of {site.operation!r} have shape {given}, the weight '
        f'has {shape}'
      )


def save(path: str | os.PathLike, bank: Bank) -> None:
  """Writes a bank as one .npz file, with a digest of its content."""
  files.write_arrays(path, columns_of(bank))


def load(path: str | os.PathLike) -> Bank:
  """The bank in a file from `save`.

  Raises:
    InputError: the file is damaged, cannot be read, or does not hold a bank.
  """
  columns = files.read_arrays(path)
  try:
    return from_columns(columns)
  except InputError as error:
    raise InputError(f'{path} holds no bank: {error}') from error
