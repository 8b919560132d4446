"""Flags that several commands share, and the `Config` made from them.

Flags with the names of fields of `Config` are its values. Flags with the names
of fields of `workloads.Sources` say where the network and its images come from.
A command defines further flags, and reads them by `define.own`.
"""

import contextlib
import dataclasses
import os
import pathlib
import warnings
from collections.abc import Generator
from typing import Any

from absl import flags as absl_flags

from experiments import define
from nemo_jax import config as config_lib
from nemo_jax import pipeline, runs, workloads
from nemo_jax.config import Config
from nemo_jax.core import files
from nemo_jax.core.types import InputError
from nemo_jax.quantization import transform
from nemo_jax.quantization.backend import lowering
from nemo_jax.quantization.numerics import ranges
from nemo_jax.quantization.ptq import reconstruct
from nemo_jax.quantization.trace import operations

FLAGS = absl_flags.FLAGS

# Limit of image sides: above those of any network, but small in memory.
_LARGEST_SIDE = 8192

define.plugin(
  'workload',
  'digits',
  f'network to compress: {", ".join(workloads.names())}; or a file of your '
  'own that ends in .py, or a module with a dot',
)
define.path(
  'weights',
  None,
  'checkpoint of the network, as .pth or .safetensors; the official one is '
  'downloaded if absent',
)
define.path(
  'data',
  None,
  'training images, for search and calibration: a folder of a prepared TFDS '
  'data set, tfds:NAME, a folder of class folders (or with those in train and '
  'val), or an .npz with x and y',
)
define.path(
  'validation',
  None,
  'test images, in the same forms; if absent, the validation split of --data, '
  'or else a part of it that the search does not use',
)
define.whole(
  'image_size',
  None,
  "sides of an image in pixels; the network's own if absent",
  high=_LARGEST_SIDE,
)
define.whole(
  'resize',
  None,
  'short side of an image in pixels before its centre is cropped; 0 for no '
  'scaling; if absent, 8/7 of the image size for ImageNet, as usual',
  low=0,
  high=2 * _LARGEST_SIDE,
)
define.whole(
  'validation_resize',
  None,
  '--resize of validation images; the same if absent',
  low=0,
  high=2 * _LARGEST_SIDE,
)
define.whole(
  'search_images',
  None,
  'number of images that score a candidate, with equal numbers of each class; '
  'if absent, 5000 for ImageNet, five of each class',
)
define.whole(
  'calibration_images',
  None,
  'number of images for calibration; 256 if absent',
)
define.whole('test_images', None, 'number of test images; all if absent')
define.whole(
  'image_seed',
  0,
  'seed of the random choice of images',
  *define.SEEDS,
)
absl_flags.DEFINE_enum(
  'calibration',
  'least_squares',
  ranges.METHODS,
  'how ranges are chosen from the calibration images',
)
define.words(
  'reconstruct',
  reconstruct.DEFAULT_STEPS,
  'steps that reduce the error of each layer at every bit-width, on the '
  f'calibration images: {", ".join(reconstruct.STEPS)}; none if empty',
  choices=reconstruct.STEPS,
  of='step',
  may_be_empty=True,
)
absl_flags.DEFINE_enum(
  'weight_scheme',
  'symmetric',
  ranges.SCHEMES,
  'weights: symmetric per output channel, or asymmetric per tensor',
)
define.words(
  'extra_ops',
  [],
  'operations besides convolutions and matrix products whose inputs are '
  f'quantized: {", ".join(operations.OPTIONAL_KINDS)}',
  choices=operations.OPTIONAL_KINDS,
  of='operation',
  may_be_empty=True,
)
absl_flags.DEFINE_enum(
  'lowering',
  'backend',
  list(lowering.LOWERINGS),
  'operations in the form that is fastest on this backend, or as traced',
)
define.number(
  'memory_gib',
  None,
  "GiB that activations may take; half of the device's memory if absent",
  0.01,
  2**14,
)
define.path(
  'cache',
  'runs/cache',
  'folder for weights, decoded images and compiled programs',
)


absl_flags.DEFINE_enum(
  'sensitivities',
  'second_order',
  config_lib.SENSITIVITIES,
  'method that estimates, on the calibration images, the loss that each '
  'bit-width of each quantizer adds',
)

_FIELDS = {field.name for field in dataclasses.fields(Config)}


def _value(name: str, value: Any) -> Any:
  """The value of a field of `Config` from the value of its flag."""
  if name == 'bit_widths':
    return tuple(int(word) for word in value)
  return tuple(value) if isinstance(value, list) else value


def config(**overrides: Any) -> Config:
  """The config of the flags that are defined.

  Fields of quantization are checked; see `check_search` for the others.

  Args:
    **overrides: fields that have no flag.

  Raises:
    InputError: a flag cannot be used.
  """
  values = {n: _value(n, FLAGS[n].value) for n in _FIELDS if n in FLAGS}
  made = Config(**values | overrides)
  with _as_flags():
    made.check_quantization()
  return made


@contextlib.contextmanager
def _as_flags() -> Generator[None]:
  """Context that turns errors of a config's fields into errors of flags."""
  try:
    yield
  except config_lib.FieldError as error:
    if error.field not in FLAGS:
      raise
    shown = define.shown(error.field)
    raise InputError(f'--{error.field}={shown}: {error.reason}') from error


def check_search(made: Config) -> None:
  """Raises `InputError` for fields of a search that cannot be used."""
  with _as_flags():
    made.check_search()


def sources(**overrides: Any) -> dict[str, Any]:
  """Fields of `workloads.Sources` from the flags and the overrides."""
  names = set(workloads.Sources._fields) - {'cache'}
  return {name: FLAGS[name].value for name in names} | overrides


def settings(made: Config) -> dict[str, Any]:
  """Flags of a run, for flags.json: the config, the workload, its sources."""
  return made.settings() | sources() | {'workload': FLAGS.workload}


def check_network() -> None:
  """Raises `InputError` for an image size that the network does not take."""
  with define.named('workload'):
    workloads.find(FLAGS.workload)
  with define.named('image_size'):
    workloads.network(FLAGS.workload, FLAGS.image_size)


def check_sources() -> None:
  """Raises `InputError` for sources that cannot be used.

  Only the existence of files is checked: nothing is read, made or downloaded.
  """
  with define.named('cache'):
    runs.check_folder(FLAGS.cache)
  if FLAGS.weights and not os.path.isfile(FLAGS.weights):
    raise InputError(f'--weights: there is no file {FLAGS.weights}')
  for name in ('data', 'validation'):
    path = FLAGS[name].value or 'tfds:'
    if not (path.startswith('tfds:') or os.path.exists(path)):
      raise InputError(f'--{name}: there is no {path}')
  check_network()
  size = workloads.network(FLAGS.workload, FLAGS.image_size).images.shape[1]
  for name in ('resize', 'validation_resize'):
    if 0 < (FLAGS[name].value or 0) < size:
      raise InputError(
        f'--{name} is {FLAGS[name].value}; it must be 0, or {size} and more'
      )
  workloads.check(FLAGS.workload, FLAGS.cache, **sources())


def cache() -> pathlib.Path:
  """The folder of the flag --cache."""
  return files.local(FLAGS.cache)


def workload_name() -> str:
  """The name of the workload in results and folders."""
  return workloads.short_name(FLAGS.workload)


def load_workload(**overrides: Any) -> workloads.Workload:
  """The workload of the flags; compiled programs are kept from now on.

  Args:
    **overrides: fields of `workloads.Sources` that override the flags.

  Raises:
    InputError: a source cannot be used.
  """
  runs.check_folder(cache(), read_only=True)
  # On a full or read-only disk there would be a warning for each of hundreds of
  # programs; a program that is not kept is compiled again.
  warnings.filterwarnings(
    'ignore', 'Error writing persistent compilation cache entry'
  )
  pipeline.keep_programs(cache())
  return workloads.load(FLAGS.workload, cache(), **sources(**overrides))


def inspect_network() -> transform.Structure:
  """Structure of the flags' network, by a trace that allocates no array."""
  return transform.inspect(
    *workloads.network(FLAGS.workload, FLAGS.image_size),
    extra_ops=FLAGS.extra_ops,
    weight_scheme=FLAGS.weight_scheme,
  )
