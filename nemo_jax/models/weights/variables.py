"""Conversion of a checkpoint's tensors to the variables of a network."""

from collections.abc import Mapping, Sequence

import flax.traverse_util
import numpy as np

from nemo_jax.core.types import InputError, PyTree

NORM_EPSILON = 1e-5  # PyTorch's default, which these networks were trained with
_NORM_STATISTICS = ('running_mean', 'running_var')


def _expected(shapes: PyTree) -> dict[str, tuple[int, ...]]:
  """Names and shapes of the tensors that a checkpoint of the network holds."""
  expected = {}
  for path, leaf in flax.traverse_util.flatten_dict(shapes).items():
    module, name = path[-2:]
    if name == 'kernel':
      *window, inputs, outputs = leaf.shape
      expected[f'{module}.weight'] = (outputs, inputs, *window)
    elif name == 'scale':
      for part in ('weight', *_NORM_STATISTICS):
        expected[f'{module}.{part}'] = leaf.shape
    else:
      expected[f'{module}.{name}'] = leaf.shape
  return expected


def _is_statistic(name: str) -> bool:
  """Whether a tensor is a running statistic of a batch norm."""
  return name.endswith(_NORM_STATISTICS)


def _listed(names: Sequence[str]) -> str:
  """The first name, and how many more there are."""
  more = f' and {len(names) - 1} more' if len(names) > 1 else ''
  return names[0] + more


def _check(
  tensors: Mapping[str, np.ndarray], expected: Mapping[str, tuple[int, ...]]
) -> None:
  """Raises `InputError` unless the tensors are those expected, and valid."""
  for name in expected:
    # In a quantized network the integer codes have the names of the weights.
    if name in tensors and not np.issubdtype(tensors[name].dtype, np.floating):
      raise InputError(
        f'{name} holds {tensors[name].dtype}, codes or counts, where float '
        'weights are needed'
      )
  missing = [name for name in expected if name not in tensors]
  extra = [name for name in tensors if name not in expected]
  if missing and not extra and all(_is_statistic(x) for x in missing):
    raise InputError(
      f'the checkpoint lacks {_listed(missing)}, statistics of batch norms; '
      "save the network's state_dict(), not its parameters alone"
    )
  if missing or extra:
    words = [
      f'{word} {_listed(names)}'
      for word, names in (('lacks', missing), ('has besides', extra))
      if names
    ]
    raise InputError(
      f'the checkpoint is of another network: it {"; it ".join(words)}'
    )
  for name, shape in expected.items():
    if tensors[name].shape != shape:
      raise InputError(
        f'{name} has shape {tensors[name].shape} in the checkpoint, '
        f'{shape} in the network'
      )
    if not np.all(np.isfinite(tensors[name])):
      raise InputError(f'{name} holds values that are not finite')
    if name.endswith('.running_var') and np.any(tensors[name] < 0):
      raise InputError(f'{name} holds a variance below zero')


def convert(tensors: Mapping[str, np.ndarray], shapes: PyTree) -> PyTree:
  """Variables of a network from the tensors of a PyTorch checkpoint.

  Kernels go from [out, in, ...] to [..., in, out]. A batch norm becomes a
  scale w / sqrt(var + eps) and a bias b - mean * scale, in double precision.

  Args:
    tensors: from `read`.
    shapes: the variables' `jax.ShapeDtypeStruct`.

  Raises:
    InputError: a tensor is missing, left over, of another shape or type, or
      holds a value that is not finite or a negative variance.
  """
  tensors = {
    name: x
    for name, x in tensors.items()
    if not name.endswith('num_batches_tracked')
  }
  _check(tensors, _expected(shapes))
  paths = flax.traverse_util.flatten_dict(shapes)
  norms = {path[-2] for path in paths if path[-1] == 'scale'}

  def scale_of(module: str) -> np.ndarray:
    variance = tensors[f'{module}.running_var'].astype(np.float64)
    return tensors[f'{module}.weight'] / np.sqrt(variance + NORM_EPSILON)

  def value(module: str, name: str) -> np.ndarray:
    if name == 'kernel':
      weight = tensors[f'{module}.weight']
      return weight.transpose(*range(2, weight.ndim), 1, 0)
    if name == 'scale':
      return scale_of(module)
    bias = tensors[f'{module}.bias']
    if module in norms:
      bias = bias - tensors[f'{module}.running_mean'] * scale_of(module)
    return bias

  with np.errstate(over='ignore'):
    flat = {
      path: np.ascontiguousarray(value(*path[-2:]), np.float32)
      for path in paths
    }
  for path, leaf in flat.items():
    if not np.all(np.isfinite(leaf)):
      raise InputError(f'{path[-2]}: its folded {path[-1]} is not finite')
  return flax.traverse_util.unflatten_dict(flat)
