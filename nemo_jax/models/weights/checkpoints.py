"""Tensors by name, from PyTorch checkpoints and safetensors files."""

import argparse
import os
import pathlib
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors

from nemo_jax.core import files
from nemo_jax.core.types import InputError, first_line

# Entries of a checkpoint that may hold weights, by preference. Averages come
# first: training recipes evaluate them, and timm loads them.
_ENTRIES = (
  'state_dict_ema',
  'model_ema',
  'ema_state_dict',
  'model_ema_state_dict',
  'ema_model',
  'ema',
  'params_ema',
  'state_dict',
  'model_state_dict',
  'model',
  'module',
  'net',
  'network',
  'params',
  'weights',
)
# Greatest depth of entries within entries; a pickle may contain itself.
_DEEPEST = 4
# Wrappers of a network put these before the names of all its tensors.
_PREFIXES = ('module.', '_orig_mod.', '_fsdp_wrapped_module.', 'model.', 'net.')
_AVERAGED = 'n_averaged'  # a counter in PyTorch's AveragedModel
_FLOATS = {
  'F64': np.float64,
  'F32': np.float32,
  'F16': np.float16,
  'BF16': jnp.bfloat16,
}
_INTEGERS = {
  'I64': np.int64,
  'I32': np.int32,
  'I16': np.int16,
  'I8': np.int8,
  'U64': np.uint64,
  'U32': np.uint32,
  'U16': np.uint16,
  'U8': np.uint8,
  'BOOL': np.bool_,
}


def _harmless() -> list:
  """Types that PyTorch may unpickle besides tensors: options and scores."""
  scalar = np._core.multiarray.scalar
  old = 'numpy.core.multiarray.scalar'
  kinds = {type(np.dtype(x)) for x in (*_FLOATS.values(), *_INTEGERS.values())}
  return [argparse.Namespace, scalar, (scalar, old), np.dtype, *kinds]


def _check_zip(path: pathlib.Path) -> None:
  """Raises `InputError` if a member differs from its checksum.

  PyTorch writes the checksums but does not check them.
  """
  with open(path, 'rb') as file:
    if file.read(4) != b'PK\3\4':
      return  # of PyTorch before 1.6, which has no checksums
  try:
    with zipfile.ZipFile(path) as archive:
      culprit = archive.testzip()
  except Exception as error:  # zipfile and zlib raise many kinds
    raise InputError(f'{path} is damaged: {first_line(error)}') from error
  if culprit:
    raise InputError(
      f'{path} is damaged, or was saved without checksums: {culprit} differs'
    )


def _unpickled(path: pathlib.Path) -> Any:
  """Content of a PyTorch file, without executing any code in it."""
  try:
    import torch
  except ImportError as error:
    raise InputError(
      f'reading {path} needs PyTorch, which is not installed: pip install '
      "'nemo_jax[torch]', or convert the file to safetensors"
    ) from error
  _check_zip(path)
  try:
    with torch.serialization.safe_globals(_harmless()):
      # Weights only: a pickle that would call anything else is refused.
      return torch.load(path, map_location='cpu', weights_only=True)
  except Exception as error:  # torch, pickle and zipfile raise many kinds
    reason = first_line(error)
    if called := re.search(r'GLOBAL (\S+)', str(error)):
      reason = f'it would call {called[1]}'
    elif 'weights_only' in str(error):  # advice to load it in spite of that
      reason = 'PyTorch cannot read it'
    raise InputError(
      f'{path} is no checkpoint of weights alone: {reason}; known are state '
      'dicts of PyTorch, and safetensors'
    ) from error


def _holds_weights(content: Any, is_tensor: Callable, depth: int) -> bool:
  """Whether a mapping holds tensors with axes, itself or in an entry."""
  if not isinstance(content, Mapping) or not depth:
    return False
  # Scalars are counters or decays, not weights.
  return any(is_tensor(x) and x.ndim for x in content.values()) or any(
    _holds_weights(content.get(name), is_tensor, depth - 1) for name in _ENTRIES
  )


def _holds_tensors(value: Any, is_tensor: Callable) -> bool:
  """Whether a value is a tensor with axes, or holds one at any depth.

  The state of an optimizer, whose entries are numbered, does not count.
  """
  if is_tensor(value):
    return bool(value.ndim)
  if isinstance(value, list | tuple):
    return any(is_tensor(x) and x.ndim for x in value)
  return isinstance(value, Mapping) and any(
    isinstance(name, str)
    and name not in ('state', 'optimizer', 'optimizer_state_dict')
    and _holds_tensors(x, is_tensor)
    for name, x in value.items()
  )


def _state_dict(
  path: pathlib.Path, content: Any, is_tensor: Callable
) -> Mapping[Any, Any]:
  """The entry of a checkpoint that holds the weights by name.

  If several entries hold weights, the first of `_ENTRIES` is taken, with a
  warning.

  Raises:
    InputError: no entry holds tensors by name.
  """
  for _ in range(_DEEPEST):
    if not isinstance(content, Mapping):
      break
    names = [
      x for x in _ENTRIES if _holds_weights(content.get(x), is_tensor, _DEEPEST)
    ]
    if not names:
      break
    others = [
      str(x) if isinstance(value, Mapping) else 'tensors'
      for x, value in content.items()
      if x not in _ENTRIES and _holds_tensors(value, is_tensor)
    ]
    if held := [*names[1:], *dict.fromkeys(others)]:
      warnings.warn(
        f'{path} holds {names[0]}, {", ".join(held)}; {names[0]} is taken',
        stacklevel=4,
      )
    content = content[names[0]]
  if not isinstance(content, Mapping) or not content:
    raise InputError(f'{path} holds no tensors by name')
  if not any(is_tensor(x) for x in content.values()):
    entries = ', '.join(repr(x) for x in list(content)[:9])
    raise InputError(
      f'{path} holds no tensors by name; its entries are {entries}'
    )
  return content


def _of_torch(name: str, tensor: Any) -> np.ndarray:
  """A PyTorch tensor as a NumPy array; floats become float32.

  Raises:
    InputError: the tensor is quantized, sparse, complex or without values.
  """
  floating = tensor.is_floating_point()
  kinds = {
    'quantized': tensor.is_quantized,
    'without values': tensor.is_meta,
    'sparse': str(tensor.layout) != 'torch.strided',
    f'of {tensor.dtype}': tensor.is_complex()
    or (floating and tensor.element_size() == 1),
  }
  for kind, found in kinds.items():
    if found:
      raise InputError(f'{name} is {kind}; float weights are needed')
  try:
    return (tensor.float() if floating else tensor).numpy(force=True)
  except (RuntimeError, TypeError) as error:
    raise InputError(
      f'{name} is of {tensor.dtype}; float weights are needed'
    ) from error


def _read_torch(path: pathlib.Path) -> dict[str, np.ndarray]:
  """The tensors of a PyTorch checkpoint by name."""
  content = _unpickled(path)
  import torch

  is_tensor = lambda x: isinstance(x, torch.Tensor)
  tensors = {}
  for name, value in _state_dict(path, content, is_tensor).items():
    if not isinstance(name, str):
      raise InputError(f'{path} holds no tensors by name: {name!r} is no name')
    if not is_tensor(value):
      raise InputError(f'{path}: {name} is a {type(value).__name__}, no tensor')
    tensors[name] = _of_torch(f'{path}: {name}', value)
  return tensors


def _read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
  """The tensors of a safetensors file by name."""
  try:
    content = safetensors.deserialize(path.read_bytes())
  except safetensors.SafetensorError as error:
    raise InputError(f'{path} is no safetensors file: {error}') from error
  tensors = {}
  for name, x in content:
    dtype = (_FLOATS | _INTEGERS).get(x['dtype'])
    if dtype is None:
      raise InputError(
        f'{path}: {name} is of {x["dtype"]}; float weights are needed'
      )
    tensor = np.frombuffer(x['data'], dtype).reshape(x['shape'])
    if x['dtype'] in _FLOATS:
      with np.errstate(over='ignore'):  # `convert` refuses infinities
        tensor = tensor.astype(np.float32)
    tensors[name] = tensor
  return tensors


def _is_safetensors(path: pathlib.Path) -> bool:
  """Whether a file has the header of safetensors, or the name and no pickle."""
  with open(path, 'rb') as file:
    head = file.read(9)
  length = int.from_bytes(head[:8], 'little')
  if head[8:] == b'{' and length <= path.stat().st_size:
    return True
  is_torch = head.startswith((b'PK\3\4', b'\x80'))
  return path.suffix.lower() == '.safetensors' and not is_torch


def _without_prefixes(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Tensors without the prefixes that all their names share."""
  while names := set(tensors) - {_AVERAGED}:
    shared = [p for p in _PREFIXES if all(x.startswith(p) for x in names)]
    if not shared:
      break
    tensors = {
      x.removeprefix(shared[0]): tensors[x] for x in tensors if x in names
    }
  return tensors


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """Tensors by name, of a safetensors file or a PyTorch checkpoint.

  No code in the file is executed. Floats become float32. If a checkpoint has
  several entries with weights, averaged weights are preferred. Prefixes that
  all names share, such as `module.` of data-parallel training, are dropped.

  Raises:
    InputError: the file cannot be read, would execute code, or holds a tensor
      without float values.
  """
  path = files.local(path)
  with files.errors_named(path):
    if not path.is_file():
      raise InputError(f'there is no file {path}')
    known = _is_safetensors(path)
    tensors = _read_safetensors(path) if known else _read_torch(path)
  return _without_prefixes(tensors)
