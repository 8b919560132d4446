"""A mesh of devices, on one host or several, and arrays divided over it."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from nemo_jax.core.types import InputError, PyTree

# Axes of the mesh: candidates are evaluated in parallel, and the images that
# score one candidate may be divided as well.
CANDIDATE, IMAGE = 'candidate', 'image'


def make_mesh(
  image_devices: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh | None:
  """Mesh [candidate, image] of the devices; None if there is only one.

  Args:
    image_devices: how many devices divide the images of one candidate.
    devices: all devices of all processes if None.

  Raises:
    InputError: the number of devices is no multiple of `image_devices`.
  """
  devices = jax.devices() if devices is None else devices
  count = len(devices)
  if image_devices < 1 or count % image_devices:
    raise InputError(
      f'image_devices is {image_devices}; it has to divide the {count} devices'
    )
  if count == 1:
    return None
  return jax.make_mesh(
    (count // image_devices, image_devices),
    (CANDIDATE, IMAGE),
    axis_types=(AxisType.Auto,) * 2,
    devices=devices,
  )


def place(tree: PyTree, mesh: Mesh | None, spec: PartitionSpec) -> PyTree:
  """The arrays of a pytree, divided over a mesh.

  Args:
    tree: arrays, with the same values in every process.
    mesh: from `make_mesh`; None puts them on the default device.
    spec: how each array is divided.
  """
  if mesh is None:
    return jax.tree.map(jax.numpy.asarray, tree)
  sharding = NamedSharding(mesh, spec)

  def one(array: Any) -> jax.Array:
    array = np.asarray(array)
    return jax.make_array_from_callback(
      array.shape, sharding, lambda index: array[index]
    )

  return jax.tree.map(one, tree)


def jit(function: Callable[..., Any], mesh: Mesh | None, **options: Any) -> Any:
  """`jax.jit` with results that are replicated, so every process has them.

  Args:
    function: what is compiled.
    mesh: of its arguments; None if there is only one device.
    **options: of `jax.jit`.
  """
  if mesh is None:
    return jax.jit(function, **options)
  everywhere = NamedSharding(mesh, PartitionSpec())
  return jax.jit(function, out_shardings=everywhere, **options)


def from_first(tree: PyTree) -> PyTree:
  """The pytree of the first process, in every process.

  With one process it is returned as it is, with its types.
  """
  if jax.process_count() == 1:
    return tree
  return multihost_utils.broadcast_one_to_all(tree)


def check_equal(digest: str, what: str) -> None:
  """Raises `InputError` unless all processes have the same digest.

  Args:
    digest: in hexadecimal.
    what: name of what the digest is of, for the message.
  """
  if jax.process_count() == 1:
    return
  number = np.asarray(int(digest[:7], 16))
  numbers = multihost_utils.process_allgather(number)
  if len(np.unique(numbers)) > 1:
    raise InputError(
      f'the processes have different {what}; give all of them the same files'
    )
