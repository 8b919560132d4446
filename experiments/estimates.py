"""What is known of a network's bit-widths before a search, by a flag."""

import jax
import numpy as np
from absl import flags

from experiments import options
from nemo_jax import __version__, workloads
from nemo_jax.core import devices, files
from nemo_jax.core.types import InputError
from nemo_jax.quantization import sensitivity

FLAGS = flags.FLAGS

flags.DEFINE_enum(
  'sensitivities',
  'second_order',
  ['none', *sensitivity.METHODS],
  'how it is estimated, before a search, what each bit-width loses at each '
  'quantizer, from the calibration images',
)


def sensitivities(workload: workloads.Workload, quantized, widths):
  """float32[N, K], by the flags, kept in the cache; or None."""
  method = FLAGS.sensitivities
  if method == 'none':
    return None
  images, labels = workload.calibration
  settings = (
    __version__,
    method,
    tuple(widths),
    quantized.analysis.sites,
    FLAGS.lowering,
  )
  settings = np.frombuffer(repr(settings).encode(), np.uint8)
  key = workload.variables, images, labels, quantized.bank, settings

  def make():
    table = sensitivity.METHODS[method](
      quantized,
      workload.variables,
      images,
      labels,
      key=jax.random.key(0),
      widths=widths,
    )
    return {'sensitivities': table}

  def parse(arrays):
    shape = len(quantized.quantizers), len(widths)
    table = arrays.get('sensitivities')
    if table is None or table.shape != shape or table.dtype != np.float32:
      raise InputError(f'it holds no sensitivities of shape {shape}')
    return table

  path = options.cache() / 'sensitivities' / f'{files.digest(key)[:32]}.npz'
  # Devices differ in the last bits, and all processes have to agree.
  return devices.from_first(files.cached(path, make, parse))


def sensitivity_evaluations(workload, quantized, widths, method=None) -> int:
  """How many evaluations of a search sensitivities cost.

  Args:
    workload: with its images.
    quantized: its network.
    widths: K bit-widths.
    method: of `sensitivity.METHODS`; that of the flags if absent.
  """
  passes = sensitivity.passes(
    method or FLAGS.sensitivities, len(quantized.quantizers), len(widths)
  )
  calibration, search = (
    len(images.labels) for images in (workload.calibration, workload.search)
  )
  return -(-passes * calibration // search)
