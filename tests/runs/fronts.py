"""Fronts that no search has found."""

import dataclasses
import json
import pathlib

import numpy as np

from nemo_jax.core import files
from nemo_jax.runs.front import Front, Point, to_json

WIDTHS = (2, 4, 8)


def point(error: float, size: float, **more) -> Point:
  """A point of `toy`, whose costs all follow from its size."""
  known = {
    'bits': WIDTHS,
    'objectives': (error, size, size / 4),
    'test_accuracy': 1 - error,
    'test_top5_accuracy': 1.0,
    'size_mb': 10 * size,
    'gbitops': 100 * size,
  }
  return Point(**known | more)


def toy(**changes) -> Front:
  """A front of three points, beside three uniform configurations."""
  uniform = zip(WIDTHS, ((0.9, 0.1), (0.2, 0.2), (0.1, 0.4)), strict=True)
  known = {
    'workload': 'toy',
    'objective_names': ('top1_error', 'size', 'bit_operations'),
    'quantizers': ('a:input', 'a/kernel', 'b/kernel'),
    'points': (
      point(0.08, 0.35, species='gcn'),
      point(0.1, 0.3, species='gcn'),
      point(0.15, 0.15, species='direct'),
    ),
    'uniform': tuple(point(*x, bits=(width,) * 3) for width, x in uniform),
    'float_point': point(0.1, 1.0, bits=()),
    'is_weight': (False, True, True),
    'bit_widths': WIDTHS,
    'species': ('direct', 'gcn'),
    'ideal': (0.0, 0.0, 0.0),
    'reference': (0.9, 1.1, 1.1),
    'seed': 3,
    'evaluations': 60,
    'failures': 1,
    'hypervolume': 0.5,
    'uniform_hypervolume': 0.3,
    'images': {'search': 400, 'calibration': 256, 'size': 8},
    'run': 'ab',
  }
  return Front(**known | changes)


def empty(run: str | None = None) -> Front:
  """A front without points."""
  return toy(points=(), run=run)


def of_two_objectives(front: Front) -> Front:
  """The front without its last objective."""
  cut = lambda p: dataclasses.replace(p, objectives=p.objectives[:2])
  return dataclasses.replace(
    front,
    objective_names=front.objective_names[:2],
    points=tuple(map(cut, front.points)),
    uniform=tuple(map(cut, front.uniform)),
    float_point=cut(front.float_point),
    ideal=front.ideal[:2],
    reference=front.reference[:2],
  )


def random(seed: int, count: int) -> Front:
  """A front whose points have sizes and performances in coarse steps."""
  draw = np.random.default_rng(seed)
  rows = draw.integers(1, 8, (count, 3)) / 10
  points = [
    point(error, 1.0, size_mb=size, gbitops=work)
    for error, size, work in rows.tolist()
  ]
  return toy(points=tuple(points))


def write(folder: pathlib.Path, **changes) -> None:
  """A sealed front.json of `toy` with other values; None deletes a key."""
  content = json.loads(json.dumps(to_json(toy()), default=files.plain))
  content = {k: v for k, v in (content | changes).items() if v is not None}
  path = folder / 'front.json'
  path.write_text(json.dumps(files.seal(content)))
