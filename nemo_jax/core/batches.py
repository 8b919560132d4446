"""Inputs of a network: a pytree of arrays whose first axis is the batch."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nemo_jax.core.types import InputError, PyTree

_ARRAYS = (np.ndarray, np.generic, jax.Array, jax.ShapeDtypeStruct)


def is_array(x: Any) -> bool:
  """Whether a value is an array of NumPy or JAX, and not one of objects."""
  return isinstance(x, _ARRAYS) and x.dtype != object


def _name(path: Any) -> str:
  """What messages call the inputs at a path of the pytree."""
  text = jax.tree_util.keystr(path, simple=True, separator='/')
  return f'inputs {text!r}' if text else 'inputs'


def check(inputs: PyTree) -> int:
  """B, the number of examples, after a check of the inputs.

  Raises:
    InputError: a leaf is no array or has no axis, there is no example, or the
      leaves differ in their number.
  """
  leaves = jax.tree_util.tree_leaves_with_path(inputs)
  if not leaves:
    raise InputError('inputs have no array; give one array [B, ...] or more')
  for path, leaf in leaves:
    if not is_array(leaf):
      raise InputError(
        f'{_name(path)} are a {type(leaf).__name__}; give arrays [B, ...]'
      )
    if not leaf.shape:
      raise InputError(f'{_name(path)} have no axes; give arrays [B, ...]')
  (first, leaf), *rest = leaves
  for path, other in rest:
    if other.shape[0] != leaf.shape[0]:
      raise InputError(
        f'{_name(first)} have {leaf.shape[0]} examples, {_name(path)} have '
        f'{other.shape[0]}'
      )
  if not leaf.shape[0]:
    raise InputError('there are no inputs; give at least one example')
  return leaf.shape[0]


def size(inputs: PyTree) -> int:
  """B, the number of examples of valid inputs."""
  return jax.tree.leaves(inputs)[0].shape[0]


def take(inputs: PyTree, rows: Any) -> PyTree:
  """The inputs of some examples.

  Args:
    inputs: a pytree of arrays [B, ...].
    rows: a slice, or an array of indices.
  """
  return jax.tree.map(lambda x: x[rows], inputs)


def on_device(inputs: PyTree) -> PyTree:
  """The inputs as JAX arrays."""
  return jax.tree.map(jnp.asarray, inputs)


def on_host(inputs: PyTree) -> PyTree:
  """The inputs as NumPy arrays."""
  return jax.tree.map(np.asarray, inputs)


def like(inputs: PyTree, count: int) -> PyTree:
  """`jax.ShapeDtypeStruct`s of the inputs with `count` examples."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype), inputs
  )
