"""Pictures of a run: its front, projections, species and bit-widths."""

import contextlib
import os
import pathlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib.ticker
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from nemo_jax.core import files
from nemo_jax.core.types import first_line
from nemo_jax.runs.point import Point, objectives_of

if TYPE_CHECKING:
  from nemo_jax.runs.front import Front

LABELS = {
  'top1_error': 'top-1 error',
  'top5_error': 'top-5 error',
  'cross_entropy': 'cross-entropy',
  'divergence': 'divergence from float',
  'size': 'model size / float',
  'bit_operations': 'bit-operations / float',
  'bit_operations_larger': 'bit-operations (larger) / float',
}


def label(name: str) -> str:
  """Label of an objective on axes and in tables."""
  return LABELS.get(name, name)


def as_good_as(width: int) -> str:
  """Label of a point from `front.choose_points`."""
  return f'as good as {width}-bit'


def save(figure: Figure, workdir: str | os.PathLike, name: str) -> pathlib.Path:
  """Writes a figure as a PNG, atomically; returns its path.

  Args:
    figure: of Matplotlib.
    workdir: the folder.
    name: of the file.
  """
  path = files.local(workdir) / name
  with files.draft(path) as made:
    figure.savefig(made, format='png', dpi=110, bbox_inches='tight')
  return path


def draw(drawings: Iterable[tuple]) -> list[pathlib.Path]:
  """Draws pictures; returns their paths. One warning names those that fail.

  Args:
    drawings: tuples of a function of this module and its arguments.
  """
  paths, failed = [], []
  for function, *arguments in drawings:
    try:
      paths.append(function(*arguments))
    except Exception as error:  # Matplotlib raises many kinds
      failed.append(f'{function.__name__} ({first_line(error)})')
  if failed:
    warnings.warn(f'pictures are left out: {", ".join(failed)}', stacklevel=2)
  return [path for path in paths if path]


def plot_front(
  workdir: str | os.PathLike, front: 'Front'
) -> pathlib.Path | None:
  """3-D picture of the first three objectives; None if there are only two.

  Performance is vertical and costs are horizontal, as in the figure of NEMO's
  paper.
  """
  names = front.objective_names
  if len(names) < 3:
    return None
  values, uniform = objectives_of(front.points), objectives_of(front.uniform)
  figure = Figure(figsize=(7.5, 6))
  axes = figure.add_subplot(projection='3d')
  dots = axes.scatter(
    values[:, 1], values[:, 2], values[:, 0], c=values[:, 0], cmap='viridis_r'
  )
  columns = (uniform[:, 1], uniform[:, 2], uniform[:, 0])
  axes.plot(*columns, 'k^--', lw=1, label='uniform')
  axes.set_xlabel(label(names[1]), labelpad=8)
  axes.set_ylabel(label(names[2]), labelpad=8)
  axes.set_zlabel(label(names[0]))
  for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
    axis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
  axes.view_init(elev=24, azim=-128)
  axes.legend(loc='upper right')
  bar = figure.colorbar(dots, ax=axes, shrink=0.6, pad=0.12)
  bar.set_label(label(names[0]))
  axes.set_title(f'{front.workload}: Pareto front, {len(values)} points')
  return save(figure, workdir, 'front_3d.png')


def projections(front: 'Front') -> Figure:
  """Figure of the first objective against each of the others, by species."""
  names, points = front.objective_names, front.points
  values, uniform = objectives_of(points), objectives_of(front.uniform)
  values = values.reshape(len(points), len(names))
  owners = np.asarray([p.species for p in points], object)
  # Points or fronts of older files may have no species.
  known = dict.fromkeys([*front.species, *owners])
  figure = Figure(figsize=(5.5 * (len(names) - 1), 4.2))
  panels = figure.subplots(1, len(names) - 1, squeeze=False)
  for k, axes in enumerate(panels[0], start=1):
    for i, owner in enumerate(known):
      rows = values[owners == owner]
      color = f'C{i}'
      axes.scatter(rows[:, k], rows[:, 0], s=18, color=color, label=owner)
    if len(uniform):
      axes.plot(uniform[:, k], uniform[:, 0], 'k^--', lw=1, label='uniform')
    for row, point in zip(uniform, front.uniform, strict=True):
      axes.annotate(
        f'{point.bits[0]}',
        (row[k], row[0]),
        textcoords='offset points',
        xytext=(5, 5),
        fontsize=8,
      )
    if front.float_point is not None:
      level = front.float_point.objectives[0]
      axes.axhline(level, color='grey', lw=1, ls=':', label='float')
    axes.set_xlabel(label(names[k]))
    axes.set_ylabel(label(names[0]))
    axes.grid(alpha=0.3)
  panels[0][0].legend(fontsize=8)
  figure.suptitle(f'{front.workload}: projections of the front')
  figure.tight_layout()
  return figure


def plot_projections(
  workdir: str | os.PathLike, front: 'Front'
) -> pathlib.Path:
  """Picture of `projections`."""
  return save(projections(front), workdir, 'front_projections.png')


def _series(
  metrics: Sequence[Mapping[str, Any]], name: str, width: int
) -> Float[np.ndarray, 'G width']:
  """A metric of G generations; NaN where a generation has no such numbers."""
  rows = np.full((len(metrics), width), np.nan)
  for row, line in zip(rows, metrics, strict=True):
    # Lines of older versions have no digest, so their values may be damaged.
    with contextlib.suppress(TypeError, ValueError):
      row[:] = np.asarray(line.get(name), float)
  return rows


def plot_species(
  workdir: str | os.PathLike,
  front: 'Front',
  metrics: Sequence[Mapping[str, Any]],
) -> pathlib.Path:
  """Picture of the species over generations: utility, size, share of the front.

  A fourth panel has the hypervolume, if it is known.

  Args:
    workdir: the folder.
    front: result of the run.
    metrics: from `read_metrics`.
  """
  generations = [m['generation'] for m in metrics]
  panels = {
    'utility': 'utility (R2, lower is better)',
    'allocation': 'size',
    'front_share': 'share of the front',
  }
  figure = Figure(figsize=(18, 3.8))
  axes = figure.subplots(1, 4)
  for panel, (key, title) in zip(axes, panels.items(), strict=False):
    # The utility of a species without a solution is stored as null.
    rows = _series(metrics, key, len(front.species))
    for i, name in enumerate(front.species):
      panel.plot(generations, rows[:, i], color=f'C{i}', label=name)
    panel.set_title(title)
  if front.uniform_hypervolume is None:
    axes[-1].remove()
  else:
    level = front.uniform_hypervolume
    axes[-1].plot(generations, _series(metrics, 'hypervolume', 1), 'k')
    axes[-1].axhline(level, color='k', ls='--', lw=1, label='uniform')
    axes[-1].set_title('hypervolume of the front')
    axes[-1].legend(fontsize=8)
  for panel in axes:
    panel.set_xlabel('generation')
    panel.grid(alpha=0.3)
  axes[0].legend(fontsize=8)
  figure.tight_layout()
  return save(figure, workdir, 'species.png')


def plot_bits(
  workdir: str | os.PathLike, front: 'Front', chosen: Mapping[int, Point]
) -> pathlib.Path:
  """Picture of the bit-widths of chosen points, by quantizer.

  Args:
    workdir: the folder.
    front: result of a run.
    chosen: from `front.choose_points`.
  """
  names = np.asarray(front.quantizers)
  is_weight = np.asarray(front.is_weight)
  bits = np.asarray([point.bits for point in chosen.values()])
  low, high = min(front.bit_widths), max(front.bit_widths)
  names_of_rows = [as_good_as(width) for width in chosen]
  figure = Figure(
    figsize=(max(6, 0.4 * is_weight.sum() + 4), 2 + 0.8 * len(chosen))
  )
  panels = figure.subplots(2, 1)
  for axes, rows, title in zip(
    panels, (is_weight, ~is_weight), ('weights', 'activations'), strict=True
  ):
    image = axes.imshow(
      bits[:, rows], aspect='auto', cmap='viridis', vmin=low, vmax=high
    )
    for (i, j), value in np.ndenumerate(bits[:, rows]):
      shade = 'white' if value < (low + high) / 2 else 'black'
      axes.text(j, i, value, ha='center', va='center', color=shade, fontsize=8)
    axes.set_xticks(range(rows.sum()), names[rows], rotation=60, ha='right')
    axes.set_yticks(range(len(chosen)), names_of_rows)
    axes.tick_params(labelsize=8)
    axes.set_title(title)
  figure.tight_layout()
  figure.colorbar(image, ax=panels, label='bits', shrink=0.8)
  return save(figure, workdir, 'bits.png')
