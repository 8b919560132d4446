"""Memory of a device, and the number of images that fit in it."""

import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import psutil

from nemo_jax.core import batches
from nemo_jax.core.types import Array, InputError, PyTree

# Activations may take this share of a device's memory. The rest is for scratch
# space of compiled programs and for other arrays.
SHARE = 0.5
# On a CPU activations get less, which keeps them near its caches: MobileNet-V2
# ran 125 images a second in batches of 8, 120 in 16 and 112 in 64.
CPU_BYTES = 160 * 2**20
# Memory that a compiled network takes, over the activations alive in its trace.
# XLA's memory analysis gives 1.8 or less for the networks of this package.
SCRATCH = 2.0


def total(device: jax.Device | None = None) -> int:
  """Bytes of memory of a device.

  For a CPU, the memory of the machine, or the limit of the control group of the
  process; several JAX devices on one CPU divide it evenly.

  Args:
    device: the first local device if None.

  Raises:
    InputError: the device does not report its memory.
  """
  device = device or jax.local_devices()[0]
  stats = device.memory_stats()
  if stats and 'bytes_limit' in stats:
    return stats['bytes_limit']
  if device.platform != 'cpu':
    raise InputError(f'{device} does not say how much memory it has; state it')
  machine, shares = psutil.virtual_memory().total, jax.local_device_count()
  try:
    limit = pathlib.Path('/sys/fs/cgroup/memory.max').read_text().strip()
  except OSError:
    limit = 'max'
  return (machine if limit == 'max' else min(machine, int(limit))) // shares


def images_at_once(
  bytes_per_image: int, budget: int | None = None, candidates: int = 1
) -> int:
  """Number of images that a network can be run on at once; at least one.

  It depends on the total memory of the device, not on what is free: a resumed
  run then gets the same number as before.

  Args:
    bytes_per_image: activations of one image, from `inspect` or `quantize`.
    budget: bytes that activations may take; a share of the memory if None.
    candidates: how many candidates are evaluated at once.
  """
  if budget is None:
    budget = int(SHARE * total())
    if jax.default_backend() == 'cpu':
      budget = min(budget, CPU_BYTES)
  return max(1, int(budget / (SCRATCH * bytes_per_image * candidates)))


def in_chunks(
  apply: Callable[[PyTree], Array], inputs: PyTree, chunk: int
) -> Array:
  """Outputs [B, ...] of a function for inputs [B, ...], chunk by chunk.

  The chunks have one size, of at most `chunk` examples, and the last is filled
  with copies of the last example. There are at least two chunks: XLA then
  computes values that do not depend on the inputs, such as quantized weights,
  once before the loop, rather than again in every operation that uses them.

  Args:
    apply: from inputs to an array whose first axis is the batch.
    inputs: a pytree of arrays [B, ...].
    chunk: how many examples are computed at once.
  """
  count = batches.size(inputs)
  if count == 1:
    return apply(inputs)
  chunks = max(2, -(-count // chunk))
  size = -(-count // chunks)
  rows = jnp.minimum(jnp.arange(chunks * size), count - 1)
  outputs = jax.lax.map(
    lambda r: apply(batches.take(inputs, r)), rows.reshape(chunks, size)
  )
  return outputs.reshape(-1, *outputs.shape[2:])[:count]
