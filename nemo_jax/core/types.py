"""Types and the error that every part of the package shares."""

from typing import Any

import jax
import numpy as np

Array = jax.Array
# What a function takes that may be on a device or on the host.
ArrayLike = jax.Array | np.ndarray
PyTree = Any


class InputError(ValueError):
  """What the caller gave cannot be used; one line says why, and the choices."""


def first_line(error: BaseException) -> str:
  """What an error says, on one line of at most 200 characters, or its kind."""
  lines = str(error).strip().splitlines() or [type(error).__name__]
  return lines[0][:200]
