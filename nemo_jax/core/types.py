"""Types of arrays, and the error for arguments that cannot be used."""

from typing import Any

import jax
import numpy as np

Array = jax.Array
# Array arguments: on a device (JAX, also a tracer) or on the host (NumPy).
ArrayLike = jax.Array | np.ndarray
PyTree = Any


class InputError(ValueError):
  """An argument cannot be used; the message, of one line, says why."""


def first_line(error: BaseException) -> str:
  """First line of an error's message, cut to 200 characters; or its class."""
  lines = str(error).strip().splitlines() or [type(error).__name__]
  return lines[0][:200]
