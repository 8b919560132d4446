"""Schema of front.json: the kinds of its values.

Version 2 is version 1 with a digest of the content under `sha256`. A key may be
absent; the value of a key that is there has to be of its kind.
"""

import os
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from nemo_jax.core.types import InputError
from nemo_jax.quantization.numerics.widths import MAX_BITS, MIN_BITS

VERSIONS = (1, 2)


class _Kind(NamedTuple):
  """A kind of value: its name in messages, and a test."""

  name: str
  holds: Callable[[Any], bool]


def _is_whole(x: Any) -> bool:
  """Whether a value is an integer, which booleans are not."""
  return isinstance(x, int) and not isinstance(x, bool)


def _is_finite(x: Any) -> bool:
  """Whether a value is a finite number."""
  # NaN compares as False, and an int may be too large for a float.
  return (_is_whole(x) or isinstance(x, float)) and -1e300 < x < 1e300


_TEXT = _Kind(
  'a text on one line', lambda x: isinstance(x, str) and x.isprintable()
)
_FLAG = _Kind('true or false', lambda x: isinstance(x, bool))
_FINITE = _Kind('a finite number', _is_finite)
# Infinite objectives are stored as null.
_OPTIONAL = _Kind(
  'a finite number or null', lambda x: x is None or _is_finite(x)
)
_COUNT = _Kind(
  'a whole number from 0', lambda x: _is_whole(x) and 0 <= x < 2**63
)
_SHARE = _Kind('a number from 0 to 1', lambda x: _is_finite(x) and 0 <= x <= 1)
_BITS = _Kind(
  f'a whole number from {MIN_BITS} to {MAX_BITS}',
  lambda x: _is_whole(x) and MIN_BITS <= x <= MAX_BITS,
)


def _describes_inputs(x: Any) -> bool:
  """Whether a value is a shape and type, or a dict, list or tuple of such."""
  if not isinstance(x, dict):
    return False
  if set(x) == {'shape', 'dtype'}:
    shape, dtype = x['shape'], x['dtype']
    return (
      isinstance(shape, list)
      and all(map(_COUNT.holds, shape))
      and isinstance(dtype, str)
      and re.fullmatch('[a-z]+[0-9]*(_[a-z0-9]+)?', dtype) is not None
    )
  if len(x) != 1:
    return False
  ((kind, held),) = x.items()
  if kind == 'dict':
    return isinstance(held, dict) and all(map(_describes_inputs, held.values()))
  is_list = kind in ('list', 'tuple') and isinstance(held, list)
  return is_list and all(map(_describes_inputs, held))


_INPUTS = _Kind('shapes and types of inputs', _describes_inputs)

# Kinds by key; [kind] is a list of values of this kind. `a.b` is the key b of
# the object a, or of each object in the list a.
_KINDS = {
  'workload': _TEXT,
  'evaluations': _COUNT,
  'failures': _COUNT,
  'hypervolume': _OPTIONAL,
  'uniform_hypervolume': _OPTIONAL,
  'objective_names': [_TEXT],
  'quantizers': [_TEXT],
  'is_weight': [_FLAG],
  'bit_widths': [_BITS],
  'species': [_TEXT],
  'float.objectives': [_FINITE],
  'float.test_accuracy': _SHARE,
  'points.bits': [_BITS],
  'points.objectives': [_FINITE],
  'points.test_accuracy': _SHARE,
  'points.species': _TEXT,
  'uniform.bits': [_BITS],
  'uniform.objectives': [_OPTIONAL],
  'uniform.test_accuracy': _SHARE,
}
# Keys that older versions lack.
_OPTIONAL_KINDS = {
  'seed': _COUNT,
  'run': _TEXT,
  'ideal': [_FINITE],
  'reference': [_FINITE],
  'float.test_top5_accuracy': _SHARE,
  'points.test_top5_accuracy': _SHARE,
  'uniform.test_top5_accuracy': _SHARE,
  'float.size_mb': _FINITE,
  'points.size_mb': _FINITE,
  'uniform.size_mb': _FINITE,
  'float.gbitops': _FINITE,
  'points.gbitops': _FINITE,
  'uniform.gbitops': _FINITE,
  'network.weights': _TEXT,
  'network.bank': _TEXT,
  'network.inputs': _INPUTS,
  'network.extra_ops': [_TEXT],
  'network.weight_scheme': _TEXT,
  'network.lowering': _TEXT,
}
# Lists that may be empty.
_MAY_BE_EMPTY = ('network.extra_ops',)
# Lists that have the length of another list.
_LIKE = {
  'is_weight': 'quantizers',
  'bits': 'quantizers',
  'objectives': 'objective_names',
  'ideal': 'objective_names',
  'reference': 'objective_names',
}
# Keys that are needed to score the points, and for tables and pictures.
SCORED = ('workload', 'quantizers', 'points.bits')
REPORTED = tuple(_KINDS)


def _shown(x: Any) -> str:
  """A value for messages; for lists and objects, the kind only."""
  if isinstance(x, list | dict):
    return 'a list' if isinstance(x, list) else 'an object'
  if _is_whole(x) and abs(x) > 10**18:
    return 'a number of over 18 digits'
  text = ascii(x)
  return text if len(text) <= 40 else f'{text[:37]}...'


def _check_value(where: str, value: Any, kind: _Kind) -> None:
  """Raises `InputError` for a value of another kind."""
  if not kind.holds(value):
    raise InputError(f'{where} is {_shown(value)}, not {kind.name}')


def _check_list(where: str, values: Any, kind: _Kind, like: Any) -> None:
  """Raises `InputError` for what is no list of a kind, as long as `like`."""
  if not isinstance(values, list):
    raise InputError(f'{where} is {_shown(values)}, no list')
  least = 0 if where in _MAY_BE_EMPTY else 1
  count = len(like) if isinstance(like, list) else max(len(values), least)
  if len(values) != count:
    raise InputError(f'{where} has {len(values)} values, not {count}')
  for i, value in enumerate(values):
    _check_value(f'{where}[{i}]', value, kind)


def _holders(content: Mapping, section: str) -> list[tuple[str, Any]]:
  """The objects of a section, each with its name in messages."""
  if not section:
    return [('', content)]
  if section not in content:
    return [(section, {})]
  held = content[section]
  if section in ('float', 'network'):
    return [(section, held)]
  if not isinstance(held, list):
    raise InputError(f'{section} is {_shown(held)}, no list')
  return [(f'{section}[{i}]', x) for i, x in enumerate(held)]


def _check(content: Any, needed: Collection[str]) -> None:
  """Raises `InputError`, without the path, for content that is no front."""
  if not isinstance(content, Mapping):
    raise InputError(f'it holds {_shown(content)}, no object')
  version = content.get('version')
  if not _is_whole(version) or version not in VERSIONS:
    known = ' and '.join(map(str, VERSIONS))
    raise InputError(
      f'it has version {_shown(version)}; this package reads {known}'
    )
  for name, kind in (_KINDS | _OPTIONAL_KINDS).items():
    section, _, key = name.rpartition('.')
    for where, holder in _holders(content, section):
      if not isinstance(holder, Mapping):
        raise InputError(f'{where} is {_shown(holder)}, no object')
      where = f'{where}.{key}'.lstrip('.')
      if key not in holder:
        if name in needed:
          raise InputError(f'{where} is missing')
      elif isinstance(kind, list):
        like = content.get(_LIKE.get(key))
        _check_list(where, holder[key], kind[0], like)
      else:
        _check_value(where, holder[key], kind)


def _check_names(content: Mapping) -> None:
  """Raises `InputError` for repeated quantizers and unknown species."""
  seen = set()
  for name in content.get('quantizers', ()):
    if name in seen:
      raise InputError(f'quantizers has {_shown(name)} twice')
    seen.add(name)
  for i, point in enumerate(content.get('points', ())):
    owner, known = point.get('species'), content.get('species')
    if owner is not None and known is not None and owner not in known:
      raise InputError(
        f'points[{i}].species is {_shown(owner)}, which is none of species'
      )


def validate(
  content: Any, path: str | os.PathLike, needed: Collection[str] = ()
) -> dict[str, Any]:
  """The content of a front.json, unchanged, after a check of its values.

  Args:
    content: of the file; unknown keys may have any value.
    path: of the file, for messages.
    needed: keys that have to be there, such as SCORED and REPORTED.

  Raises:
    InputError: the version is unknown, a needed key is missing, or a value is
      of another kind, length or range; the message has the path and the key.
  """
  try:
    _check(content, needed)
    _check_names(content)
  except InputError as error:
    raise InputError(f'{path} is no front: {error}') from error
  return content
