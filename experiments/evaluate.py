"""Scores configurations of bit-widths on images.

  python -m experiments.evaluate --workload=mobilenet_v2 --data=TRAIN \
    --validation=VALIDATION --bits=float,8,w4a8,6,4

prints a JSON line for each configuration: float, one bit-width at all
quantizers, separate bit-widths of weights and activations, or with --front the
points of a search. Calibration images come from --data, and test images from
--validation.
"""

import json
from collections.abc import Sequence

import numpy as np
from absl import flags as absl_flags

from experiments import define, flags
from experiments.launch import launch
from nemo_jax import pipeline, workloads
from nemo_jax.config import Config
from nemo_jax.core.types import InputError
from nemo_jax.quantization import costs
from nemo_jax.quantization.numerics import widths
from nemo_jax.quantization.trace.analysis import Quantizer
from nemo_jax.runs.front import Front
from nemo_jax.runs.schema import SCORED
from nemo_jax.tasks import scoring

absl_flags.adopt_module_key_flags(flags)

define.words(
  'bits',
  ['float', '8', '6', '4'],
  'configurations: float, a bit-width, or a pair such as w4a8',
)
define.path(
  'front', None, 'folder of a search, whose front is scored instead of --bits'
)
define.words('points', ['all'], 'points of the front, by number from 0, or all')


def points_of(
  folder: str, words: Sequence[str], quantizers: Sequence[Quantizer]
) -> dict[str, np.ndarray]:
  """Bits [N] of the points of a front, by name.

  Args:
    folder: of the search.
    words: numbers of points, or `all` alone.
    quantizers: N quantizers of the network.

  Raises:
    InputError: the front cannot be read or is of another network, or has no
      such point.
  """
  with define.named('front'):
    front = Front.load(folder, needed=SCORED)
  if front.quantizers != tuple(q.name for q in quantizers):
    raise InputError(
      f'--front={folder} is of {front.workload} with '
      f'{len(front.quantizers)} quantizers; the network of the flags has '
      f'{len(quantizers)} others'
    )
  if not front.points:
    raise InputError(f'--front={folder} has no point')
  if words == ['all']:
    words = [str(i) for i in range(len(front.points))]
  for word in words:
    if word not in map(str, range(len(front.points))):
      raise InputError(
        f'--points has {word!r}; the front has points 0 to '
        f'{len(front.points) - 1}'
      )
  return {f'point {w}': np.asarray(front.points[int(w)].bits) for w in words}


def check() -> tuple[Config, dict[str, np.ndarray]]:
  """The config, and the bits [N] of the configurations by name.

  Raises:
    InputError: a flag cannot be used.
  """
  flags.check_sources()
  own, config = define.own(__name__), flags.config()
  if own.front and define.present('bits'):
    raise InputError('--front stands in place of --bits; give one of them')
  if define.present('points') and not own.front:
    raise InputError('--points are those of a front; name it with --front')
  quantizers = flags.inspect_network().quantizers
  if own.front:
    return config, points_of(own.front, own.points, quantizers)
  is_weight = [q.is_weight for q in quantizers]
  with define.named('bits'):
    return config, {w: widths.from_word(w, is_weight) for w in own.bits}


def run() -> None:
  """Scores the configurations and prints their lines."""
  config, rows = check()
  # No images for a search.
  workload = flags.load_workload(search_images=0)
  quantized = pipeline.quantize_network(workload, config, flags.cache())
  accuracy = scoring.accuracy(
    quantized,
    workload.variables,
    *workloads.unseen(workload),
    np.stack(list(rows.values())),
    images_at_once=pipeline.images_at_once(quantized.structure, config),
  )
  table = quantized.costs
  full = widths.FLOAT_BITS**2 * int(table.macs.sum())
  stored = widths.FLOAT_BITS * table.parameters
  for (name, bits), (top1, top5) in zip(rows.items(), accuracy, strict=True):
    is_float = name == 'float'
    line = {
      'workload': workload.name,
      'configuration': name,
      'calibration': config.calibration,
      'reconstruct': config.reconstruct,
      'images': len(workloads.unseen(workload).labels),
      'top1': round(float(top1), 5),
      'top5': round(float(top5), 5),
      'size_bits': stored if is_float else costs.model_size(table, bits),
      'bit_operations': full if is_float else costs.bit_operations(table, bits),
    }
    line['size_ratio'] = line['size_bits'] / stored
    line['bit_operation_ratio'] = line['bit_operations'] / full
    print(json.dumps(line))


def main() -> None:
  """The command."""
  launch(run)


if __name__ == '__main__':
  main()
