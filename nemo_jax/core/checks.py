"""Checks of arguments: arrays of the right shape and kind, choices, numbers.

Shapes and types are known while a function is traced, but values are not.
Checks of values are therefore made only where `concrete` returns them.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nemo_jax.core.types import Array, InputError

_KINDS = {
  'bool': 'truth values',
  'whole': 'whole numbers',
  'real': 'real numbers',
  'number': 'real numbers',
  'any': 'real numbers',
}


def concrete(value: Any) -> np.ndarray | None:
  """The values of an array, on the host; None for a tracer."""
  if isinstance(value, jax.core.Tracer):
    return None
  return np.asarray(value)


def choice(name: str, value: str, choices: Iterable[str]) -> None:
  """Raises `InputError` unless a value is one of the choices.

  Args:
    name: of the value, for messages.
    value: what was given.
    choices: what is allowed.
  """
  known = list(choices)
  if value not in known:
    raise InputError(f'{name} is {value!r}; the choices are {", ".join(known)}')


def whole(name: str, value: Any, least: int = 1) -> int:
  """The value as an int, checked to be a whole number from `least`.

  Args:
    name: of the value, for messages.
    value: a Python or NumPy integer.
    least: the smallest that is allowed.

  Raises:
    InputError: the value is smaller, or is no whole number.
  """
  if not hasattr(value, '__index__') or value < least:
    raise InputError(f'{name} is {value!r}; give a whole number from {least}')
  return int(value)


def array(
  name: str, value: Any, axes: str, kind: str = 'real', **sizes: int
) -> Array:
  """The value as a JAX array, checked for its shape and kind.

  Args:
    name: of the value, for messages.
    value: an array, or nested lists of numbers.
    axes: a letter for each axis, such as 'nM'; a leading '.' stands for any
      further axes in front.
    kind: what is allowed, and the type of the result:
      `bool`: booleans.
      `whole`: integers, of 32 bits or more.
      `real`: numbers, as floats of 32 bits or more.
      `number`: numbers; integers stay integers, of 32 bits or more.
      `any`: numbers, in the type that is given.
    **sizes: sizes of axes, by letter; the other axes may have any size.

  Raises:
    InputError: the value has another shape or kind, or is no array.
  """
  value = _as_array(name, value)
  shape, letters = value.shape, axes.lstrip('.')
  own = shape[-len(letters) :] if axes[0] == '.' and letters else shape
  fits = len(own) == len(letters) and all(
    sizes.get(letter, size) == size
    for letter, size in zip(letters, own, strict=True)
  )
  if not fits:
    wanted = ', '.join(str(sizes.get(letter, letter)) for letter in letters)
    more = '..., ' if axes[0] == '.' else ''
    raise InputError(f'{name}: the shape is {shape}; give [{more}{wanted}]')
  if kind == 'bool' and not value.size:
    return value.astype(bool)
  if not _is_kind(value.dtype, kind):
    raise InputError(
      f'{name}: the type is {value.dtype.name}; give {_KINDS[kind]}'
    )
  return _widened(value, kind)


def _as_array(name: str, value: Any) -> Array:
  """The value as a JAX array of any shape and type; else `InputError`."""
  if isinstance(value, jax.Array):
    return value
  try:
    if not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(value)):
      value = np.asarray(value)
      # JAX would silently drop the upper 32 of 64 bits.
      if value.dtype.kind in 'iu' and value.dtype.itemsize == 8 and value.size:
        bounds = np.iinfo(jnp.result_type(int))
        if value.min() < bounds.min or value.max() > bounds.max:
          value = value.astype(np.float64)
    return jnp.asarray(value)
  except (TypeError, ValueError, OverflowError) as error:
    line = str(error).splitlines()[0]
    raise InputError(f'{name}: no array of numbers: {line}') from error


def _is_kind(dtype: Any, kind: str) -> bool:
  """Whether values of a dtype are of a kind; see `array`."""
  if kind == 'bool':
    return jnp.issubdtype(dtype, jnp.bool_)
  if kind == 'whole':
    return jnp.issubdtype(dtype, jnp.integer)
  wanted = (jnp.bool_, jnp.integer, jnp.floating)
  return any(jnp.issubdtype(dtype, one) for one in wanted)


def _widened(value: Array, kind: str) -> Array:
  """The value in the type that its kind asks for; see `array`."""
  if kind == 'bool' or (kind == 'any' and value.dtype.kind != 'V'):
    return value
  narrow = value.dtype.itemsize < 4
  if jnp.issubdtype(value.dtype, jnp.floating):
    return value.astype(jnp.float32) if narrow else value
  if kind == 'real':
    return value.astype(jnp.result_type(float))
  return value.astype(jnp.int32) if narrow else value
