"""From the final state of a search to its `Front`, scored on test images."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nemo_jax import pipeline
from nemo_jax.core import devices, files
from nemo_jax.core.log import Log
from nemo_jax.core.types import PyTree
from nemo_jax.pipeline import Prepared
from nemo_jax.quantization import costs
from nemo_jax.quantization.numerics import widths
from nemo_jax.runs.front import Front
from nemo_jax.runs.model import Model, network_of
from nemo_jax.runs.point import Point
from nemo_jax.search import progress
from nemo_jax.search.evaluate import evaluate
from nemo_jax.search.problem import Problem
from nemo_jax.search.state import State
from nemo_jax.tasks import mixed_precision, scoring

# Fields of `Workload` with images, by their use.
USES = ('calibration', 'search', 'test')


def _accuracies(
  prepared: Prepared, bits: np.ndarray, log: Log
) -> list[dict[str, Any]]:
  """Accuracies on the test images as fields of `Point`, for bits [n, N]."""
  workload, quantized = prepared.workload, prepared.quantized
  if workload.test is None:
    return [{} for _ in bits]
  log.line(f'scoring the front on {len(workload.test.labels)} unseen images')
  found = scoring.accuracy(
    quantized,
    workload.variables,
    *workload.test,
    bits,
    images_at_once=pipeline.images_at_once(
      quantized.structure, prepared.config
    ),
    mesh=prepared.problem.mesh,
  )
  return [
    {'test_accuracy': float(top1), 'test_top5_accuracy': float(top5)}
    for top1, top5 in found
  ]


def describe(
  prepared: Prepared,
  state: State,
  log: Log,
  run_digest: str | None = None,
) -> Front:
  """The front of a search, with accuracies on the test images.

  Args:
    prepared: from `pipeline.prepare`.
    state: of the search.
    log: for progress messages.
    run_digest: of the run's flags and files; None if it is not stored.
  """
  quantized, problem = prepared.quantized, prepared.problem
  structure, workload = quantized.structure, prepared.workload
  points, uniform, float_point = _points(prepared, state, log)
  counts = {
    use: len(given.labels)
    for use in USES
    if (given := getattr(workload, use)) is not None
  }
  return Front(
    workload=workload.name,
    objective_names=tuple(problem.objective_names),
    quantizers=tuple(q.name for q in structure.quantizers),
    points=points,
    uniform=uniform,
    float_point=float_point,
    is_weight=tuple(q.is_weight for q in structure.quantizers),
    bit_widths=tuple(prepared.config.bit_widths),
    species=tuple(prepared.config.team()),
    ideal=tuple(map(files.plain, problem.ideal)),
    reference=tuple(map(files.plain, problem.reference)),
    seed=prepared.config.seed,
    evaluations=int(np.asarray(state.evaluations, np.int64).sum()),
    failures=int(state.failures),
    hypervolume=_volume(problem, points),
    uniform_hypervolume=_volume(problem, uniform),
    images=counts | _side(workload.search.images),
    network=network_of(
      quantized,
      workload.variables,
      workload.search.images,
      prepared.config.weight_scheme,
    ),
    run=run_digest,
    model=Model(quantized, workload.variables),
  )


def _points(
  prepared: Prepared, state: State, log: Log
) -> tuple[tuple[Point, ...], tuple[Point, ...], Point]:
  """Points of a state, sorted; points of uniform bits; the float point."""
  problem, table = prepared.problem, prepared.quantized.costs
  archive = jax.device_get(state.archive)
  rows = np.flatnonzero(np.isfinite(archive.objectives).all(axis=1))
  rows = rows[np.lexsort(archive.objectives[rows].T[::-1])]
  uniform = np.asarray(mixed_precision.uniform(problem))
  first = devices.jit(evaluate, problem.mesh)(problem, uniform)
  values = np.concatenate([first, archive.objectives[rows]])
  own = np.asarray(problem.data.bit_widths)
  bits = own[np.concatenate([uniform, archive.choices[rows]])]
  float_row = widths.float_bits(bits.shape[1])
  on_test = _accuracies(prepared, np.concatenate([[float_row], bits]), log)
  names = list(prepared.config.team())
  owners = [None] * len(uniform) + [names[archive.species[row]] for row in rows]
  points = tuple(
    Point(
      bits=tuple(row.tolist()),
      objectives=tuple(map(files.plain, objectives)),
      species=owner,
      **_sizes(table, row),
      **more,
    )
    for row, objectives, owner, more in zip(
      bits, values, owners, on_test[1:], strict=True
    )
  )
  float_point = Point(
    objectives=tuple(
      mixed_precision.float_objectives(
        problem, len(prepared.workload.search.labels)
      )
    ),
    # The float network has no scales of quantizers.
    size_mb=widths.FLOAT_BITS * table.parameters / 8e6,
    gbitops=costs.bit_operations(table, float_row) / 1e9,
    **on_test[0],
  )
  return points[len(uniform) :], points[: len(uniform)], float_point


def _volume(problem: Problem, points: Sequence[Point]) -> float | None:
  """Hypervolume of points; None for more than three objectives."""
  if len(problem.ideal) not in (2, 3):
    return None
  values = np.asarray([point.objectives for point in points], np.float32)
  values = values.reshape(len(points), len(problem.ideal))
  values = np.where(np.isfinite(values), values, np.inf)
  return float(progress.hypervolume(problem, jnp.asarray(values)))


def _side(inputs: PyTree) -> dict[str, int]:
  """The height of images, as `size`; nothing for other inputs."""
  is_image = isinstance(inputs, np.ndarray) and inputs.ndim == 4
  return {'size': inputs.shape[1]} if is_image else {}


def _sizes(table: costs.Costs, bits: np.ndarray) -> dict[str, Any]:
  """Model size and BitOps of bits [N], as fields of `Point`."""
  return {
    'size_mb': costs.model_size(table, bits) / 8e6,
    'gbitops': costs.bit_operations(table, bits) / 1e9,
  }
