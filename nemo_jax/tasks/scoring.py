"""Networks scored on labelled images: float logits and accuracies."""

import functools
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax.sharding import PartitionSpec

from nemo_jax.core import batches, devices, memory
from nemo_jax.core.types import Array, ArrayLike, InputError, PyTree
from nemo_jax.quantization.numerics import widths
from nemo_jax.quantization.quantized import Quantized
from nemo_jax.quantization.trace import finite, tracing
from nemo_jax.tasks.objectives import in_top_k

# That `accuracy` sends to the device in one block of images.
CHUNKS = 16
# Of the way from guessing to all right; less is no trained network's accuracy.
LEAST_SKILL = 0.2


def check_labels(labels: ArrayLike, count: int, num_classes: int) -> None:
  """Raises `InputError` unless there is a class for each image."""
  known = np.asarray(labels)
  if known.shape != (count,):
    raise InputError(
      f'labels have shape {known.shape}; there are {count} inputs'
    )
  if not np.issubdtype(known.dtype, np.integer) or not (
    known.min() >= 0 and known.max() < num_classes
  ):
    raise InputError(
      f'labels go from {known.min()} to {known.max()}; classes are whole '
      f'numbers from 0 to {num_classes - 1}'
    )


def check_finite(
  quantized: Quantized, variables: PyTree, inputs: PyTree, logits: Array
) -> None:
  """Raises `InputError` unless the float network's logits are finite."""
  bad = np.flatnonzero(~np.isfinite(np.asarray(logits)).all(axis=1))
  if len(bad):
    first = slice(bad[0], bad[0] + 1)
    example = batches.on_device(batches.take(inputs, first))
    raise InputError(
      f'the float network is not finite on {len(bad)} of {len(logits)} inputs: '
      f'{finite.culprit(quantized, variables, example)}'
    )


def warn_if_guessing(top1: float, images: int, classes: int) -> None:
  """Warns if the float network's top-1 accuracy is near that of guessing.

  Labels in another order than the checkpoint's leave a few classes in place, so
  that it need not be as low as chance.
  """
  guess = 1 / classes
  if top1 < guess + LEAST_SKILL * (1 - guess):
    warnings.warn(
      f'the float network is right on {100 * top1:.1f} % of {images} images, '
      f'little better than guessing ({100 * guess:.1f} %): are the labels in '
      "the order of the checkpoint's classes?",
      stacklevel=3,
    )


def check_skill(logits: Array, labels: ArrayLike) -> None:
  """Warns if float logits [B, C] are right little more often than guessing."""
  right = in_top_k(logits, jnp.asarray(labels, jnp.int32), 1)
  warn_if_guessing(float(jnp.mean(right)), len(labels), logits.shape[1])


def float_logits(
  quantized: Quantized, variables: PyTree, inputs: PyTree, images_at_once: int
) -> Array:
  """float32[B, C]: what the network says in float."""

  @jax.jit
  def logits(variables, inputs):
    run = lambda part: quantized.map_operands(variables, part)
    return memory.in_chunks(run, inputs, images_at_once)

  return logits(variables, batches.on_device(inputs)).astype(jnp.float32)


def _max_bits(bits: np.ndarray) -> int | None:
  """The promise that can be made of bits, in few steps: each is a program."""
  return widths.NARROW_BITS if np.max(bits) <= widths.NARROW_BITS else None


def _programs(
  quantized: Quantized, chunk: int, mesh: jax.sharding.Mesh | None
) -> Callable[[int | None], Callable[..., Array]]:
  """From a promise on the bits to the program that scores under it.

  A program takes variables, bank, inputs, labels and bits, and returns
  bool[B, 2], whether each image is right by its best and its five best logits.
  """

  def hits(max_bits, variables, bank, inputs, labels, bits):
    encoded = quantized.encode(variables, bits, bank, max_bits)
    run = lambda part: quantized.run(variables, part, encoded)
    logits = memory.in_chunks(run, inputs, chunk).astype(jnp.float32)
    return jnp.stack([in_top_k(logits, labels, k) for k in (1, 5)], axis=1)

  @functools.cache
  def program(max_bits):
    score = functools.partial(hits, max_bits)
    if mesh is not None:
      whole, by_image = PartitionSpec(), PartitionSpec(mesh.axis_names)
      score = jax.shard_map(
        score,
        mesh=mesh,
        in_specs=(whole, whole, by_image, by_image, whole),
        out_specs=by_image,
        check_vma=False,
      )
    return devices.jit(score, mesh)

  return program


def accuracy(
  quantized: Quantized,
  variables: PyTree,
  inputs: PyTree,
  labels: np.ndarray,
  bits: np.ndarray,
  *,
  images_at_once: int | None = None,
  mesh: jax.sharding.Mesh | None = None,
) -> np.ndarray:
  """float32[P, 2]: top-1 and top-5 accuracy of configurations.

  Inputs may be more than the device holds: they come to it block by block.

  Args:
    quantized: from `quantize`.
    variables: of the network.
    inputs: a pytree of arrays [B, ...].
    labels: [B] int.
    bits: [P, N] int32; `widths.float_bits` for the float network.
    images_at_once: as for `make_problem`.
    mesh: devices that share the images.

  Raises:
    InputError: there is not a class for each image, or the network returns no
      logits.
  """
  structure = quantized.structure
  chunk = images_at_once or memory.images_at_once(structure.bytes_per_image)
  total = tracing.check_arguments(variables, inputs)
  classes = structure.num_classes()
  check_labels(labels, total, classes)
  count = len(structure.quantizers)
  bits = np.stack([widths.check_bits(row, count) for row in bits])
  program = _programs(quantized, chunk, mesh)
  whole, by_image = PartitionSpec(), PartitionSpec(mesh and mesh.axis_names)
  own = devices.place((variables, quantized.bank), mesh, whole)
  shares = mesh.size if mesh is not None else 1
  block = shares * min(CHUNKS * chunk, -(-total // shares))
  counts = np.zeros((len(bits), 2), np.int64)
  with tqdm.tqdm(
    total=len(bits) * total,
    desc='scoring',
    unit='image',
    disable=None,
  ) as bar:
    for start in range(0, total, block):
      count = min(block, total - start)
      # The last block is filled up, so that one program serves all.
      rows = np.minimum(np.arange(start, start + block), total - 1)
      part = devices.place(
        (batches.take(inputs, rows), labels[rows]), mesh, by_image
      )
      for i, row in enumerate(bits):
        right = program(_max_bits(row))(*own, *part, row)
        counts[i] += np.asarray(right)[:count].sum(axis=0)
        bar.update(count)
  found = (counts / total).astype(np.float32)
  is_float = np.all(bits > widths.MAX_BITS, axis=1)
  for top1 in found[is_float, 0]:
    warn_if_guessing(float(top1), total, classes)
  return found
