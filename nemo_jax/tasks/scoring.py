"""Float logits and accuracies of networks on labelled images."""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax.sharding import PartitionSpec
from jaxtyping import Bool, Float, Int

from nemo_jax.core import batches, devices, memory
from nemo_jax.core.types import Array, ArrayLike, InputError, PyTree
from nemo_jax.quantization.numerics import widths
from nemo_jax.quantization.numerics.bank import Bank
from nemo_jax.quantization.quantized import Quantized
from nemo_jax.quantization.trace import finite, tracing
from nemo_jax.tasks.objectives import in_top_k

# Chunks of images that `accuracy` sends to a device in one block.
CHUNKS = 16
# Skill is 0 for guessing and 1 for no error. A network below this is taken to
# be untrained, or its labels to be in another order.
LEAST_SKILL = 0.2


def check_labels(
  labels: ArrayLike | Sequence[Any], count: int, num_classes: int
) -> None:
  """Raises `InputError` unless labels are `count` classes, whole numbers.

  Args:
    labels: [B].
    count: number of inputs.
    num_classes: classes are 0 to num_classes - 1.
  """
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
  quantized: Quantized,
  variables: PyTree,
  inputs: PyTree,
  logits: Float[Array, 'B C'],
) -> None:
  """Raises `InputError` unless the float network's logits are finite.

  The message names the first operation whose result is not finite.

  Args:
    quantized: from `quantize`.
    variables: of the network.
    inputs: a pytree of arrays [B, ...].
    logits: of the float network.
  """
  bad = np.flatnonzero(~np.isfinite(np.asarray(logits)).all(axis=1))
  if len(bad):
    first = slice(bad[0], bad[0] + 1)
    example = batches.on_device(batches.take(inputs, first))
    raise InputError(
      f'the float network is not finite on {len(bad)} of {len(logits)} inputs: '
      f'{finite.culprit(quantized, variables, example)}'
    )


def warn_if_guessing(
  top1: float, images: int, classes: int, stacklevel: int = 2
) -> None:
  """Warns if the float network's top-1 accuracy is little above guessing.

  Labels in another order than the checkpoint's leave a few classes in place, so
  that the accuracy may be above guessing with wrong labels as well.

  Args:
    top1: the accuracy, from 0 to 1.
    images: how many it was measured on.
    classes: number of classes.
    stacklevel: frame that the warning names, counted as by `warnings.warn`:
      1 is the function that calls this one.
  """
  guess = 1 / classes
  if top1 < guess + LEAST_SKILL * (1 - guess):
    warnings.warn(
      f'the float network is right on {100 * top1:.1f} % of {images} images, '
      f'little better than guessing ({100 * guess:.1f} %): are the labels in '
      "the order of the checkpoint's classes?",
      stacklevel=stacklevel + 1,
    )


def check_skill(
  logits: Float[Array, 'B C'],
  labels: ArrayLike | Sequence[Any],
  stacklevel: int = 2,
) -> None:
  """Warns if the float network's top-1 accuracy is little above guessing.

  Args:
    logits: of the float network.
    labels: [B], classes from 0.
    stacklevel: see `warn_if_guessing`.
  """
  right = in_top_k(logits, jnp.asarray(labels, jnp.int32), 1)
  top1, (images, classes) = float(jnp.mean(right)), logits.shape
  warn_if_guessing(top1, images, classes, stacklevel + 1)


def float_logits(
  quantized: Quantized, variables: PyTree, inputs: PyTree, images_at_once: int
) -> Float[Array, 'B C']:
  """Logits of the float network, in float32.

  Args:
    quantized: from `quantize`.
    variables: of the network.
    inputs: a pytree of arrays [B, ...].
    images_at_once: how many images the network is run on at once.
  """

  @jax.jit
  def logits(variables: PyTree, inputs: PyTree) -> Array:
    run = lambda part: quantized.map_operands(variables, part)
    return memory.in_chunks(run, inputs, images_at_once)

  return logits(variables, batches.on_device(inputs)).astype(jnp.float32)


def _max_bits(bits: np.ndarray) -> int | None:
  """Upper bound of bit-widths, as `encode` takes it; None for none.

  It has two values only, since each is compiled to a program of its own.
  """
  return widths.NARROW_BITS if np.max(bits) <= widths.NARROW_BITS else None


def _programs(
  quantized: Quantized, chunk: int, mesh: jax.sharding.Mesh | None
) -> Callable[[int | None], Callable[..., Array]]:
  """A function from an upper bound of bit-widths to a compiled program.

  A program takes variables, bank, inputs, labels and bits, and returns
  bool[B, 2]: whether the label of each image is its largest logit, and whether
  it is among its five largest.
  """

  def hits(
    max_bits: int | None,
    variables: PyTree,
    bank: Bank,
    inputs: PyTree,
    labels: Int[Array, ' B'],
    bits: Int[ArrayLike, ' N'],
  ) -> Bool[Array, 'B 2']:
    encoded = quantized.encode(variables, bits, bank, max_bits)
    run = lambda part: quantized.run(variables, part, encoded)
    logits = memory.in_chunks(run, inputs, chunk).astype(jnp.float32)
    return jnp.stack([in_top_k(logits, labels, k) for k in (1, 5)], axis=1)

  @functools.cache
  def program(max_bits: int | None) -> Callable[..., Array]:
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
  labels: ArrayLike,
  bits: ArrayLike | Sequence[Any],
  *,
  images_at_once: int | None = None,
  mesh: jax.sharding.Mesh | None = None,
) -> Float[np.ndarray, 'P 2']:
  """Top-1 and top-5 accuracy of configurations, from 0 to 1, in float32.

  Inputs may be larger than the memory of the device, to which they are sent
  block by block. A warning tells of a float network that is little better than
  guessing.

  Args:
    quantized: from `quantize`.
    variables: of the network.
    inputs: a pytree of arrays [B, ...].
    labels: [B] integers, classes from 0.
    bits: [P, N], bit-widths; `widths.float_bits` is the float network.
    images_at_once: how many images the network is run on at once; as many as
      fit the memory of the device if None.
    mesh: devices that share the images.

  Raises:
    InputError: there is not a class for each image, a bit-width cannot be used,
      or the network returns no logits.
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
      # The last block is filled with copies of the last image, so that all
      # blocks have one shape and one program.
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
