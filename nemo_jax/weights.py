"""Published checkpoints as variables of the networks in `models`.

A network's modules carry the names that its checkpoint uses, so that what is
left to do is to turn kernels round and to fold batch norms.
"""

import hashlib
import http.client
import os
import pathlib
import tempfile
import urllib.request
from collections.abc import Mapping

import flax.traverse_util
import numpy as np
import safetensors.numpy
import tqdm

from nemo_jax.base import InputError, PyTree

NORM_EPSILON = 1e-5  # PyTorch's default, which these networks were trained with
_NORM_STATISTICS = ('running_mean', 'running_var')


def _read_torch(path: pathlib.Path) -> Mapping:
  try:
    import torch
  except ImportError as error:
    raise InputError(
      f'reading {path} needs PyTorch, which is not installed: pip install '
      "'nemo_jax[torch]', or convert the file to safetensors"
    ) from error
  try:
    # Weights only: a pickle that would call anything else is refused.
    content = torch.load(path, map_location='cpu', weights_only=True)
  except Exception as error:  # torch, pickle and zipfile raise many kinds
    reason = str(error).strip().splitlines() or [type(error).__name__]
    raise InputError(
      f'{path} is no checkpoint of weights alone: {reason[0][:200]}'
    ) from error
  for key in ('state_dict', 'model'):
    if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
      content = content[key]
  if not isinstance(content, Mapping) or not content:
    raise InputError(f'{path} holds no tensors by name')
  for name, value in content.items():
    if not isinstance(value, torch.Tensor):
      raise InputError(f'{path}: {name} is a {type(value).__name__}, no tensor')
  return {
    name: (v.float() if v.is_floating_point() else v).numpy()
    for name, v in content.items()
  }


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """The tensors in a file by name: safetensors, or a checkpoint of PyTorch.

  Loading executes nothing that the file may hold. The prefix `module.`, which
  data-parallel training leaves, is dropped.

  Raises:
    InputError: it cannot be read, or would execute code.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise InputError(f'there is no file {path}')
  if path.suffix == '.safetensors':
    try:
      tensors = safetensors.numpy.load_file(path)
    except Exception as error:
      raise InputError(f'{path} is no safetensors file: {error}') from error
  else:
    tensors = _read_torch(path)
  return {name.removeprefix('module.'): x for name, x in tensors.items()}


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


def _check(tensors, expected: dict[str, tuple[int, ...]]) -> None:
  """Raises `InputError` unless there are these tensors and no others."""
  missing = [name for name in expected if name not in tensors]
  extra = [name for name in tensors if name not in expected]
  if missing or extra:
    words = [
      f'{word} {names[0]} and {len(names) - 1} more'
      if len(names) > 1
      else f'{word} {names[0]}'
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


def convert(tensors: Mapping[str, np.ndarray], shapes: PyTree) -> PyTree:
  """Variables of a network from the tensors of a PyTorch checkpoint.

  Kernels go from [out, in, ...] to [..., in, out]. A batch norm becomes a
  scale w / sqrt(var + eps) and a bias b - mean * scale, in double precision.

  Args:
    tensors: from `read`.
    shapes: the variables' `jax.ShapeDtypeStruct`.

  Raises:
    InputError: a tensor is missing, left over, or of another shape.
  """
  tensors = {
    name: x
    for name, x in tensors.items()
    if not name.endswith('num_batches_tracked')
  }
  _check(tensors, _expected(shapes))
  paths = flax.traverse_util.flatten_dict(shapes)
  norms = {path[-2] for path in paths if path[-1] == 'scale'}

  def scale_of(module):
    variance = tensors[f'{module}.running_var'].astype(np.float64)
    return tensors[f'{module}.weight'] / np.sqrt(variance + NORM_EPSILON)

  def value(module, name):
    if name == 'kernel':
      weight = tensors[f'{module}.weight']
      return weight.transpose(*range(2, weight.ndim), 1, 0)
    if name == 'scale':
      return scale_of(module)
    bias = tensors[f'{module}.bias']
    if module in norms:
      bias = bias - tensors[f'{module}.running_mean'] * scale_of(module)
    return bias

  flat = {
    path: np.ascontiguousarray(value(*path[-2:]), np.float32) for path in paths
  }
  return flax.traverse_util.unflatten_dict(flat)


def download(url: str, folder: str | os.PathLike) -> pathlib.Path:
  """The file at a URL, kept in a folder; named by its hash, and checked.

  The name ends in `-` and the first digits of the SHA-256, as torchvision's do.

  Raises:
    InputError: it cannot be fetched, or is not what its name says.
  """
  name = url.rpartition('/')[2]
  path = pathlib.Path(folder) / name
  if path.exists():
    return path
  path.parent.mkdir(parents=True, exist_ok=True)
  # Written aside and renamed, so that a kill leaves no half a file.
  with tempfile.TemporaryDirectory(dir=path.parent) as aside:
    draft = pathlib.Path(aside) / name
    sha = hashlib.sha256()
    try:
      with (
        open(draft, 'wb') as file,
        urllib.request.urlopen(url, timeout=30) as response,
        tqdm.tqdm(
          total=int(response.headers.get('Content-Length') or 0) or None,
          desc=f'downloading {name}',
          unit='B',
          unit_scale=True,
          disable=None,
        ) as bar,
      ):
        while block := response.read(1 << 20):
          file.write(block)
          sha.update(block)
          bar.update(len(block))
    except (OSError, http.client.HTTPException) as error:
      raise InputError(
        f'cannot download {url}: {error}; fetch it elsewhere and name the '
        'file with --weights'
      ) from error
    digits = draft.stem.rpartition('-')[2]
    if not sha.hexdigest().startswith(digits):
      raise InputError(
        f'what came from {url} has SHA-256 {sha.hexdigest()[:16]}..., its name '
        f'says {digits}'
      )
    os.replace(draft, path)
  return path
