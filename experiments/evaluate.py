"""Scores configurations of bit-widths on images.

  python -m experiments.evaluate --workload=mobilenet_v2 --data=TRAIN \
    --validation=VALIDATION --bits=float,8,w4a8,6,4

prints a JSON line for each: float, the same bits everywhere, weights and
activations apart, or with --front the points of a search. Calibration images
come from --data, those that are scored from --validation.
"""

import json
import re

import numpy as np
from absl import flags

from experiments import define, options
from experiments.launch import launch
from nemo_jax import runs
from nemo_jax.core.types import InputError
from nemo_jax.quantization import costs
from nemo_jax.quantization.numerics import widths as widths_lib
from nemo_jax.quantization.transform import Structure
from nemo_jax.runs import front as front_lib
from nemo_jax.tasks import mixed_precision

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(options)

define.words(
  'bits',
  ['float', '8', '6', '4'],
  'configurations: float, a number of bits, or such as w4a8',
)
define.path(
  'front', None, 'folder of a search, whose front is scored in place of --bits'
)
define.words(
  'points', ['all'], 'which points of the front, by number from 0, or all'
)


def bits_of(word: str, quantizers) -> np.ndarray:
  """int32[N]: what a word of --bits stands for."""
  if word == 'float':
    return widths_lib.float_bits(len(quantizers))
  match = re.fullmatch('([0-9]{1,2})|w([0-9]{1,2})a([0-9]{1,2})', word)
  low, high = widths_lib.MIN_BITS, widths_lib.MAX_BITS
  pair = [int(x) for x in match.groups() if x] if match else []
  if not pair or not all(low <= x <= high for x in pair):
    raise InputError(
      f'--bits has {word!r}; the choices are float, numbers from {low} to '
      f'{high}, and such as w4a8'
    )
  weight, activation = pair[0], pair[-1]
  rows = [weight if q.is_weight else activation for q in quantizers]
  return np.asarray(rows, np.int32)


def points_of(front: dict, quantizers) -> dict[str, np.ndarray]:
  """The bits of the points of a front that --points names."""
  if front['quantizers'] != [q.name for q in quantizers]:
    raise InputError(
      f'--front={FLAGS.front} is of {front["workload"]} with '
      f'{len(front["quantizers"])} quantizers; the network of the flags has '
      f'{len(quantizers)} others'
    )
  points, words = front['points'], FLAGS.points
  if not points:
    raise InputError(f'--front={FLAGS.front} has no point')
  if words == ['all']:
    words = [str(i) for i in range(len(points))]
  for word in words:
    if word not in map(str, range(len(points))):
      raise InputError(
        f'--points has {word!r}; the front has points 0 to {len(points) - 1}'
      )
  return {f'point {w}': np.asarray(points[int(w)]['bits']) for w in words}


def check() -> tuple[Structure, dict[str, np.ndarray]]:
  """The network, and by name the bits of what the flags ask to score.

  Raises:
    InputError: a flag cannot be used.
  """
  options.check()
  if FLAGS.front and FLAGS['bits'].present:
    raise InputError('--front stands in place of --bits; give one of them')
  if FLAGS['points'].present and not FLAGS.front:
    raise InputError('--points are those of a front; name it with --front')
  structure = options.inspect_network()
  if not FLAGS.front:
    return structure, {w: bits_of(w, structure.quantizers) for w in FLAGS.bits}
  with define.named('front'):
    front = runs.read_front(FLAGS.front, front_lib.SCORED)
  return structure, points_of(front, structure.quantizers)


def run() -> None:
  """The experiment."""
  structure, rows = check()
  # None for a search.
  workload = options.load_workload(search_images=0)
  quantized = options.quantize_workload(workload)
  accuracy = scoring.accuracy(
    quantized,
    workload.variables,
    *workload.test,
    np.stack(list(rows.values())),
    images_at_once=options.images_at_once(quantized),
  )
  table = structure.costs
  full = widths_lib.FLOAT_BITS**2 * int(table.macs.sum())
  stored = widths_lib.FLOAT_BITS * table.parameters
  for (name, bits), (top1, top5) in zip(rows.items(), accuracy, strict=True):
    is_float = name == 'float'
    line = {
      'workload': workload.name,
      'configuration': name,
      'calibration': FLAGS.calibration,
      'reconstruct': FLAGS.reconstruct,
      'images': len(workload.test.labels),
      'top1': round(float(top1), 5),
      'top5': round(float(top5), 5),
      'size_bits': stored if is_float else costs.model_size(table, bits),
      'bit_operations': full if is_float else costs.bit_operations(table, bits),
    }
    line['size_ratio'] = line['size_bits'] / stored
    line['bit_operation_ratio'] = line['bit_operations'] / full
    print(json.dumps(line))


if __name__ == '__main__':
  launch(run)
