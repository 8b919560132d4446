"""Flags that experiments share: the network, its images, its quantizers."""

import os
import pathlib
import sys
import warnings

import jax
import numpy as np
from absl import flags

from experiments import define
from nemo_jax import __version__, quantize, runs, workloads
from nemo_jax.core import files, memory
from nemo_jax.core.types import InputError
from nemo_jax.quantization import transform
from nemo_jax.quantization.backend import lowering
from nemo_jax.quantization.numerics import bank as bank_lib
from nemo_jax.quantization.numerics import ranges as ranges_lib
from nemo_jax.quantization.ptq import reconstruct
from nemo_jax.quantization.trace import operations

FLAGS = flags.FLAGS

# Larger images than any network sees; an array of them is still small.
_LARGEST_SIDE = 8192

define.word(
  'workload',
  'digits',
  f'network to compress: {", ".join(workloads.names())}',
  choices=workloads.names(),
  of='workload',
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
flags.DEFINE_enum(
  'calibration',
  'least_squares',
  ranges_lib.METHODS,
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
flags.DEFINE_enum(
  'weight_scheme',
  'symmetric',
  ranges_lib.SCHEMES,
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
flags.DEFINE_enum(
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


def check_network() -> None:
  """Raises `InputError` for an image size that the network does not take."""
  with define.named('image_size'):
    workloads.network(FLAGS.workload, FLAGS.image_size)


def check() -> None:
  """Raises `InputError` for flags of this file that cannot be used.

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
  with define.named('image_size'):
    size = workloads.network(FLAGS.workload, FLAGS.image_size).images.shape[1]
  for name in ('resize', 'validation_resize'):
    if 0 < (FLAGS[name].value or 0) < size:
      raise InputError(
        f'--{name} is {FLAGS[name].value}; it must be 0, or {size} and more'
      )
  workloads.check(FLAGS.workload, FLAGS.cache, **_sources())


def _sources(**overrides) -> dict:
  """The fields of `workloads.Sources` by the flags, and what is given."""
  names = set(workloads.Sources._fields) - {'cache'}
  return {name: FLAGS[name].value for name in names} | overrides


def values(*modules, without=()) -> dict:
  """The flags of this file and of other modules that make a run what it is."""
  own = [
    flag
    for module in (sys.modules[__name__], *modules)
    for flag in FLAGS.get_flags_for_module(module)
  ]
  without = ('cache', 'memory_gib', *without)
  return {flag.name: flag.value for flag in own if flag.name not in without}


def cache() -> pathlib.Path:
  """The folder of what is costly to make."""
  return files.local(FLAGS.cache)


def load_workload(**overrides) -> workloads.Workload:
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
  if jax.config.jax_compilation_cache_dir is None:
    folder = cache().absolute() / 'xla'
    jax.config.update('jax_compilation_cache_dir', os.fspath(folder))
    # Many small programs take longer to compile than to read.
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
    jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
  sources = _sources(**overrides)
  return workloads.load(FLAGS.workload, cache(), **sources)


def inspect_network() -> transform.Structure:
  """The network of the flags, traced; nothing is read or allocated."""
  return transform.inspect(
    *workloads.network(FLAGS.workload, FLAGS.image_size),
    extra_ops=FLAGS.extra_ops,
    weight_scheme=FLAGS.weight_scheme,
  )


def quantize_workload(workload: workloads.Workload):
  """The quantized network of a workload, by the flags; its bank is kept."""
  quantized = quantize(
    workload.apply,
    workload.variables,
    workload.calibration.images,
    extra_ops=FLAGS.extra_ops,
    calibration=FLAGS.calibration,
    weight_scheme=FLAGS.weight_scheme,
    lowering=FLAGS.lowering,
  )
  if not FLAGS.reconstruct:
    return quantized
  images = workload.calibration.images
  settings = __version__, sorted(FLAGS.reconstruct), quantized.analysis.sites
  settings = np.frombuffer(repr(settings).encode(), np.uint8)
  key = files.digest((workload.variables, images, quantized.bank, settings))

  def make():
    made = reconstruct.reconstruct(
      quantized,
      workload.variables,
      images,
      steps=FLAGS.reconstruct,
      chunk=min(16, images_at_once(quantized)),
    )
    return bank_lib.columns_of(made.bank)

  def parse(columns):
    bank = bank_lib.from_columns(columns)
    bank_lib.check_fits(bank, quantized.bank, quantized.analysis.sites)
    return quantized.with_bank(bank)

  path = cache() / 'banks' / f'{key[:32]}.npz'
  return files.cached(path, make, parse)


def digests(workload: workloads.Workload) -> dict[str, str]:
  """SHA-256 of the weights, and of the images and labels of each use."""
  content = {'weights': workload.variables}
  for use in ('calibration', 'search', 'test'):
    images, labels = getattr(workload, use)
    content |= {f'images of the {use}': images, f'labels of the {use}': labels}
  return {name: files.digest(tree) for name, tree in content.items()}


def images_at_once(quantized, candidates: int = 1) -> int:
  """How many images fit the memory of the flags, of a number of candidates."""
  budget = FLAGS.memory_gib and int(FLAGS.memory_gib * 2**30)
  return memory.images_at_once(
    quantized.structure.bytes_per_image, budget, candidates
  )
