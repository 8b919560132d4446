"""What is known of a network's bit-widths before a search, by a flag."""

import os
import pathlib

import jax
import numpy as np
from absl import flags

from nemo_jax import __version__, devices, files, workloads
from nemo_jax.base import InputError
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
  """float32[N, K], by the flags, kept in the cache; or None.

  Raises:
    InputError: what is kept is damaged.
  """
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
  folder = pathlib.Path(FLAGS.cache) / 'sensitivities'
  path = folder / f'{files.digest(key)[:32]}.npy'
  if path.exists():
    try:
      return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
      raise InputError(f'cannot read {path}: {error}; delete it') from error
  table = np.asarray(
    sensitivity.METHODS[method](
      quantized,
      workload.variables,
      images,
      labels,
      key=jax.random.key(0),
      widths=widths,
    )
  )
  # Devices differ in the last bits, and all processes have to agree.
  table = devices.from_first(table)
  if jax.process_index() == 0:
    folder.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f'.{path.stem}.draft.npy')
    np.save(draft, table)
    os.replace(draft, path)
  return table


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
