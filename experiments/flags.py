"""The flags that commands share, and the `Config` that they make.

Flags whose names are fields of `pipeline.Config` make a `Config`; those whose
names are fields of `workloads.Sources` say where the network and its images
come from. A command defines flags of its own, and gets them from `define.own`.
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

# Larger images than any network sees; an array of them is still small.
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
  'images for the end, likewise; the validation split of --data if absent, or '
  'else a part of it that the search never sees',
)
define.whole(
  'image_size',
  None,
  "sides; the network's own if absent",
  high=_LARGEST_SIDE,
)
define.whole(
  'resize',
  None,
  'short side of an image before its centre is cut out; 0 leaves images as '
  'they are; 8/7 of the image size for ImageNet if absent, as usual',
  low=0,
  high=2 * _LARGEST_SIDE,
)
define.whole(
  'validation_resize',
  None,
  'that of validation images; --resize if absent',
  low=0,
  high=2 * _LARGEST_SIDE,
)
define.whole(
  'search_images',
  None,
  'images that score a candidate, of all classes alike; 5000 for ImageNet if '
  'absent, five a class',
)
define.whole(
  'calibration_images', None, 'images that set ranges; 256 if absent'
)
define.whole('test_images', None, 'validation images to score; all if absent')
define.whole(
  'image_seed',
  0,
  'which images are drawn, where not all are taken',
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
  'what is done to quantize each layer well at every width, from the '
  f'calibration images: {", ".join(reconstruct.STEPS)}; nothing if empty',
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
  'operations beside convolutions and matrix products whose inputs are '
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
  'memory that activations may take; half of what the device has if absent',
  0.01,
  2**14,
)
define.path(
  'cache',
  'runs/cache',
  'where weights, decoded images and compiled programs are kept',
)


absl_flags.DEFINE_enum(
  'sensitivities',
  'second_order',
  config_lib.SENSITIVITIES,
  'how it is estimated, before a search, what each bit-width loses at each '
  'quantizer, from the calibration images',
)

_FIELDS = {field.name for field in dataclasses.fields(Config)}


def _value(name: str, value: Any) -> Any:
  if name == 'bit_widths':
    return tuple(int(word) for word in value)
  return tuple(value) if isinstance(value, list) else value


def config(**overrides: Any) -> Config:
  """The config of the flags that are defined, checked as far as it concerns.

  Args:
    **overrides: fields that no flag decides.

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
  """Errors of a config's fields, as those of flags."""
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
  """The fields of `workloads.Sources` by the flags, and what is given."""
  names = set(workloads.Sources._fields) - {'cache'}
  return {name: FLAGS[name].value for name in names} | overrides


def settings(made: Config) -> dict[str, Any]:
  """What a run was started with: the config, the workload and its sources."""
  return made.settings() | sources() | {'workload': FLAGS.workload}


def check_network() -> None:
  """Raises `InputError` for an image size that the network does not take."""
  with define.named('workload'):
    workloads.find(FLAGS.workload)
  with define.named('image_size'):
    workloads.network(FLAGS.workload, FLAGS.image_size)


def check_sources() -> None:
  """Raises `InputError` for flags that name what cannot be used.

  Nothing is made, read or downloaded but the names of files.
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
  """The folder of what is costly to make."""
  return files.local(FLAGS.cache)


def workload_name() -> str:
  """The name of the workload in results and folders."""
  return workloads.short_name(FLAGS.workload)


def load_workload(**overrides: Any) -> workloads.Workload:
  """The workload of the flags; from now on compiled programs are kept.

  Args:
    **overrides: fields of `workloads.Sources` that the flags do not decide.
  """
  runs.check_folder(cache(), read_only=True)
  # There may be hundreds, of a disk that is full or read-only: what is not
  # kept is compiled again.
  warnings.filterwarnings(
    'ignore', 'Error writing persistent compilation cache entry'
  )
  pipeline.keep_programs(cache())
  return workloads.load(FLAGS.workload, cache(), **sources(**overrides))


def inspect_network() -> transform.Structure:
  """The network of the flags, traced; nothing is read or allocated."""
  return transform.inspect(
    *workloads.network(FLAGS.workload, FLAGS.image_size),
    extra_ops=FLAGS.extra_ops,
    weight_scheme=FLAGS.weight_scheme,
  )
