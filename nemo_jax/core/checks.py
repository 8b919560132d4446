"""Arrays as callers give them: of the shape and kind that a function needs.

Shapes and types are known while a function is traced. Values are not, so that
what depends on them is checked only where `concrete` has them.
"""

from collections.abc import Iterable

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


def concrete(value) -> np.ndarray | None:
  """The values on the host; None while they are traced."""
  if isinstance(value, jax.core.Tracer):
    return None
  return np.asarray(value)


def choice(name: str, value: str, choices: Iterable[str]) -> None:
  """Raises `InputError` unless a value is one of the choices."""
  known = list(choices)
  if value not in known:
    raise InputError(f'{name} is {value!r}; the choices are {", ".join(known)}')


def whole(name: str, value, least: int = 1) -> int:
  """A whole number that is not below the least.

  Raises:
    InputError: it is, or is no whole number.
  """
  if not hasattr(value, '__index__') or value < least:
    raise InputError(f'{name} is {value!r}; give a whole number from {least}')
  return int(value)


def array(
  name: str, value, axes: str, kind: str = 'real', **sizes: int
) -> Array:
  """An array with these axes, in a type that can be computed with.

  Args:
    name: of the value, for messages.
    value: an array, or lists of numbers.
    axes: a letter for each, such as 'nM'; a leading '.' stands for any more.
    kind: `bool`; `whole`, for integers; `real`, which makes floats of integers,
      in float32 or wider; `number`, which leaves them integers, of 32 bits or
      more; `any`, which leaves narrow ones as they are.
    **sizes: of axes, by letter; the others are free.

  Raises:
    InputError: another shape or kind, or nothing that is an array.
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


def _as_array(name, value) -> Array:
  if isinstance(value, jax.Array):
    return value
  try:
    if not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(value)):
      value = np.asarray(value)
      # JAX would keep the lower half of 64 bits.
      if value.dtype.kind in 'iu' and value.dtype.itemsize == 8 and value.size:
        bounds = np.iinfo(jnp.result_type(int))
        if value.min() < bounds.min or value.max() > bounds.max:
          value = value.astype(np.float64)
    return jnp.asarray(value)
  except (TypeError, ValueError, OverflowError) as error:
    line = str(error).splitlines()[0]
    raise InputError(f'{name}: no array of numbers: {line}') from error


def _is_kind(dtype, kind: str) -> bool:
  if kind == 'bool':
    return jnp.issubdtype(dtype, jnp.bool_)
  if kind == 'whole':
    return jnp.issubdtype(dtype, jnp.integer)
  wanted = (jnp.bool_, jnp.integer, jnp.floating)
  return any(jnp.issubdtype(dtype, one) for one in wanted)


def _widened(value: Array, kind: str) -> Array:
  """The value in 32 bits or more, of floats where it is real."""
  if kind == 'bool' or (kind == 'any' and value.dtype.kind != 'V'):
    return value
  narrow = value.dtype.itemsize < 4
  if jnp.issubdtype(value.dtype, jnp.floating):
    return value.astype(jnp.float32) if narrow else value
  if kind == 'real':
    return value.astype(jnp.result_type(float))
  return value.astype(jnp.int32) if narrow else value
