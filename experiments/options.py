"""Flags that experiments share: the network, its images, its quantizers."""

import os
import pathlib
import sys

import jax
import numpy as np
from absl import flags

from nemo_jax import (
  __version__,
  files,
  memory,
  quantize,
  runs,
  workloads,
)
from nemo_jax.quantization import bank as bank_lib
from nemo_jax.quantization import (
  calibrate,
  lowering,
  operations,
  reconstruct,
  transform,
)

FLAGS = flags.FLAGS

flags.DEFINE_string(
  'workload', 'digits', f'network to compress: {", ".join(workloads.names())}'
)
flags.DEFINE_string(
  'weights',
  None,
  'checkpoint of the network, as .pth or .safetensors; the official one is '
  'downloaded if absent',
)
flags.DEFINE_string(
  'data',
  None,
  'training images, for search and calibration: a folder of a prepared TFDS '
  'data set, tfds:NAME, a folder of class folders (or with those in train and '
  'val), or an .npz with x and y',
)
flags.DEFINE_string(
  'validation',
  None,
  'images for the end, likewise; the validation split of --data if absent, or '
  'else a part of it that the search never sees',
)
flags.DEFINE_integer('image_size', None, "sides; the network's own if absent")
flags.DEFINE_integer(
  'resize',
  None,
  'short side of an image before its centre is cut out; 0 leaves images as '
  'they are; 8/7 of the image size for ImageNet if absent, as usual',
  0,
)
flags.DEFINE_integer(
  'validation_resize', None, 'that of validation images; --resize if absent', 0
)
flags.DEFINE_integer(
  'search_images',
  None,
  'images that score a candidate, of all classes alike; 5000 for ImageNet if '
  'absent, five a class',
  1,
)
flags.DEFINE_integer(
  'calibration_images', None, 'images that set ranges; 256 if absent', 1
)
flags.DEFINE_integer(
  'test_images', None, 'validation images to score; all if absent', 1
)
flags.DEFINE_integer(
  'image_seed', 0, 'which images are drawn, where not all are taken', 0
)
flags.DEFINE_enum(
  'calibration',
  'least_squares',
  calibrate.METHODS,
  'how ranges are chosen from the calibration images',
)
flags.DEFINE_list(
  'reconstruct',
  list(reconstruct.DEFAULT_STEPS),
  'what is done to quantize each layer well at every width, from the '
  f'calibration images: {", ".join(reconstruct.STEPS)}; nothing if empty',
)
flags.register_validator(
  'reconstruct',
  lambda steps: set(steps) <= set(reconstruct.STEPS),
  f'the choices are {", ".join(reconstruct.STEPS)}',
)
flags.DEFINE_enum(
  'weight_scheme',
  'symmetric',
  calibrate.SCHEMES,
  'weights: symmetric per output channel, or asymmetric per tensor',
)
flags.DEFINE_list(
  'also_quantize',
  [],
  'operations beside convolutions and matrix products whose inputs are '
  f'quantized: {", ".join(operations.OPTIONAL_KINDS)}',
)
flags.DEFINE_enum(
  'lowering',
  'backend',
  list(lowering.LOWERINGS),
  'operations in the form that is fastest on this backend, or as traced',
)
flags.DEFINE_float(
  'memory_gib',
  None,
  'memory that activations may take; half of what the device has if absent',
  0.01,
)
flags.DEFINE_string(
  'cache',
  'runs/cache',
  'where weights, decoded images and compiled programs are kept',
)


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
  if jax.config.jax_compilation_cache_dir is None:
    folder = cache().absolute() / 'xla'
    jax.config.update('jax_compilation_cache_dir', os.fspath(folder))
    # Many small programs take longer to compile than to read.
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
    jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
  names = set(workloads.Sources._fields) - {'cache'}
  sources = {name: FLAGS[name].value for name in names} | overrides
  return workloads.load(FLAGS.workload, cache(), **sources)


def inspect_network() -> transform.Structure:
  """The network of the flags, traced; nothing is read or allocated."""
  return transform.inspect(
    *workloads.network(FLAGS.workload, FLAGS.image_size),
    also=FLAGS.also_quantize,
    weight_scheme=FLAGS.weight_scheme,
  )


def quantize_workload(workload: workloads.Workload):
  """The quantized network of a workload, by the flags; its bank is kept."""
  quantized = quantize(
    workload.apply,
    workload.variables,
    workload.calibration.images,
    also=FLAGS.also_quantize,
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
  return memory.images_at_once(quantized.bytes_per_image, budget, candidates)
