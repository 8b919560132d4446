"""How much of a device's memory there is, and how many images fit."""

import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import psutil

from nemo_jax.core import batches
from nemo_jax.core.types import Array, InputError, PyTree

# Activations may take this share of a device's memory: compilers keep scratch
# space beside them, and other arrays have to fit as well.
SHARE = 0.5
# A CPU is fastest while they stay near its caches: MobileNet-V2 ran 125 images
# a second at 8 at once, 120 at 16 and 112 at 64.
CPU_BYTES = 160 * 2**20
# Scratch space of a compiled network over the activations alive in its trace:
# at most 1.8 on the networks of this package, as XLA's memory analysis says.
SCRATCH = 2.0


def total(device: jax.Device | None = None) -> int:
  """Bytes of memory that a device has, as it says itself.

  A CPU's are those of the machine, or of the control group that the process
  is confined to; devices that are made of one CPU share them.
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
  """How many images a network may see at once; at least one.

  It follows from the memory that there is, not from what is free just now, so
  that a run which is resumed does the same as before.

  Args:
    bytes_per_image: of activations, from `inspect` or `quantize`.
    budget: bytes that they may take; if absent, a share of the device's.
    candidates: how many of them see every image at once.
  """
  if budget is None:
    budget = int(SHARE * total())
    if jax.default_backend() == 'cpu':
      budget = min(budget, CPU_BYTES)
  return max(1, int(budget / (SCRATCH * bytes_per_image * candidates)))


def in_chunks(
  apply: Callable[[PyTree], Array], inputs: PyTree, chunk: int
) -> Array:
  """The outputs for inputs [B, ...], at most `chunk` examples at once.

  The chunks are of one size, as even as can be; the last is filled up with
  copies of the last example. There are two at least, for what does not depend
  on the inputs, such as a quantized weight, is then computed once, before the
  loop; XLA would else fuse it into every use.
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
