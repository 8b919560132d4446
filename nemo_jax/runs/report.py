"""Pictures of a run: the front, its projections, the species, the bits."""

import contextlib
import os
import pathlib
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib

matplotlib.use('Agg')

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

from nemo_jax.arena import contest as arena  # noqa: E402
from nemo_jax.core import files  # noqa: E402
from nemo_jax.core.types import first_line  # noqa: E402

LABELS = {
  'top1_error': 'top-1 error',
  'top5_error': 'top-5 error',
  'cross_entropy': 'cross-entropy',
  'divergence': 'divergence from float',
  'size': 'model size / float',
  'bit_operations': 'bit-operations / float',
  'bit_operations_larger': 'bit-operations (larger) / float',
}


def _label(name: str) -> str:
  return LABELS.get(name, name)


def _save(figure, workdir, name: str) -> pathlib.Path:
  path = files.local(workdir) / name
  try:
    with files.draft(path) as made:
      figure.savefig(made, format='png', dpi=110, bbox_inches='tight')
  finally:
    plt.close(figure)
  return path


def draw(drawings: Iterable[tuple]) -> list[pathlib.Path]:
  """Pictures; one warning names those that fail, which is no error of a run.

  Args:
    drawings: functions of this module, each with its arguments.
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


def _columns(points: Sequence[dict]) -> np.ndarray:
  return np.asarray([p['objectives'] for p in points], float)


def plot_front(workdir: str | os.PathLike, front: dict[str, Any]):
  """The front in the space of its first three objectives; None if it has two.

  Performance goes up and the costs span the floor, as in NEMO's figure.
  """
  names = front['objective_names']
  if len(names) < 3:
    return None
  values, uniform = _columns(front['points']), _columns(front['uniform'])
  figure = plt.figure(figsize=(7.5, 6))
  axes = figure.add_subplot(projection='3d')
  dots = axes.scatter(
    values[:, 1], values[:, 2], values[:, 0], c=values[:, 0], cmap='viridis_r'
  )
  columns = (uniform[:, 1], uniform[:, 2], uniform[:, 0])
  axes.plot(*columns, 'k^--', lw=1, label='uniform')
  axes.set_xlabel(_label(names[1]), labelpad=8)
  axes.set_ylabel(_label(names[2]), labelpad=8)
  axes.set_zlabel(_label(names[0]))
  for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
    axis.set_major_locator(plt.MaxNLocator(5))
  axes.view_init(elev=24, azim=-128)
  axes.legend(loc='upper right')
  bar = figure.colorbar(dots, ax=axes, shrink=0.6, pad=0.12)
  bar.set_label(_label(names[0]))
  axes.set_title(f'{front["workload"]}: Pareto front, {len(values)} points')
  return _save(figure, workdir, 'front_3d.png')


def plot_projections(workdir: str | os.PathLike, front: dict[str, Any]):
  """The first objective against each of the others, by species."""
  names, points = front['objective_names'], front['points']
  values, uniform = _columns(points), _columns(front['uniform'])
  owners = np.asarray([p['species'] for p in points])
  figure, panels = plt.subplots(
    1, len(names) - 1, figsize=(5.5 * (len(names) - 1), 4.2), squeeze=False
  )
  for k, axes in enumerate(panels[0], start=1):
    for i, owner in enumerate(front['species']):
      rows = values[owners == owner]
      color = f'C{i}'
      axes.scatter(rows[:, k], rows[:, 0], s=18, color=color, label=owner)
    axes.plot(uniform[:, k], uniform[:, 0], 'k^--', lw=1, label='uniform')
    for row, widths in zip(uniform, front['uniform'], strict=True):
      axes.annotate(
        f'{widths["bits"][0]}',
        (row[k], row[0]),
        textcoords='offset points',
        xytext=(5, 5),
        fontsize=8,
      )
    axes.axhline(
      front['float']['objectives'][0], color='grey', lw=1, ls=':', label='float'
    )
    axes.set_xlabel(_label(names[k]))
    axes.set_ylabel(_label(names[0]))
    axes.grid(alpha=0.3)
  panels[0][0].legend(fontsize=8)
  figure.suptitle(f'{front["workload"]}: projections of the front')
  figure.tight_layout()
  return _save(figure, workdir, 'front_projections.png')


def _series(metrics: list[dict], name: str, width: int) -> np.ndarray:
  """float[G, width]: of each generation; NaN where it has no such numbers."""
  rows = np.full((len(metrics), width), np.nan)
  for row, line in zip(rows, metrics, strict=True):
    # Lines of older versions have no digest, so anything may be in them.
    with contextlib.suppress(TypeError, ValueError):
      row[:] = np.asarray(line.get(name), float)
  return rows


def plot_species(
  workdir: str | os.PathLike, front: dict[str, Any], metrics: list[dict]
):
  """Utility, size and share of the front of each species over generations."""
  generations = [m['generation'] for m in metrics]
  panels = {
    'utility': 'utility (R2, lower is better)',
    'allocation': 'size',
    'front_share': 'share of the front',
  }
  figure, axes = plt.subplots(1, 4, figsize=(18, 3.8))
  for panel, (key, title) in zip(axes, panels.items(), strict=False):
    # A species without a solution yet has no utility, which is stored as null.
    rows = _series(metrics, key, len(front['species']))
    for i, name in enumerate(front['species']):
      panel.plot(generations, rows[:, i], color=f'C{i}', label=name)
    panel.set_title(title)
  if front['uniform_hypervolume'] is None:
    axes[-1].remove()
  else:
    level = front['uniform_hypervolume']
    axes[-1].plot(generations, _series(metrics, 'hypervolume', 1), 'k')
    axes[-1].axhline(level, color='k', ls='--', lw=1, label='uniform')
    axes[-1].set_title('hypervolume of the front')
    axes[-1].legend(fontsize=8)
  for panel in axes:
    panel.set_xlabel('generation')
    panel.grid(alpha=0.3)
  axes[0].legend(fontsize=8)
  figure.tight_layout()
  return _save(figure, workdir, 'species.png')


def plot_bits(
  workdir: str | os.PathLike, front: dict[str, Any], chosen: list[dict]
):
  """The bits of chosen points, layer by layer.

  Args:
    workdir: where to.
    front: the content of front.json.
    chosen: points of the front, each with a `name`.
  """
  names = np.asarray(front['quantizers'])
  is_weight = np.asarray(front['is_weight'])
  bits = np.asarray([p['bits'] for p in chosen])
  low, high = min(front['bit_widths']), max(front['bit_widths'])
  figure, panels = plt.subplots(
    2, 1, figsize=(max(6, 0.4 * is_weight.sum() + 4), 2 + 0.8 * len(chosen))
  )
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
    axes.set_yticks(range(len(chosen)), [p['name'] for p in chosen])
    axes.tick_params(labelsize=8)
    axes.set_title(title)
  figure.tight_layout()
  figure.colorbar(image, ax=panels, label='bits', shrink=0.8)
  return _save(figure, workdir, 'bits.png')


def choose_points(front: dict[str, Any], widths: Sequence[int]) -> list[dict]:
  """For each uniform width, the cheapest point that performs no worse.

  Cheapest is the least mean of the costs, each in units of the uniform
  configuration's. A width that no point matches is left out.
  """
  values = _columns(front['points'])
  chosen = []
  for width in widths:
    uniform = next((u for u in front['uniform'] if u['bits'][0] == width), None)
    if uniform is None:
      continue
    goal = np.asarray(uniform['objectives'])
    cost = np.mean(values[:, 1:] / goal[1:], axis=1)
    cost = np.where(values[:, 0] <= goal[0], cost, np.inf)
    if np.isfinite(cost.min()):
      point = front['points'][int(np.argmin(cost))]
      chosen.append(point | {'name': f'as good as {width}-bit'})
  return chosen


def table(front: dict[str, Any], chosen: list[dict]) -> str:
  """A text table: the float network, uniform widths, chosen points."""
  names = front['objective_names']
  head = ['', *(_label(n) for n in names), 'test accuracy', 'species']
  rows = [('float', front['float'])]
  for width in (8, 6, 4, 2):
    for point in front['uniform']:
      if point['bits'][0] == width:
        rows.append((f'uniform {width}-bit', point))
    match = [p for p in chosen if p['name'].endswith(f' {width}-bit')]
    rows += [(point['name'], point) for point in match]
  cells = [head]
  for name, point in rows:
    numbers = [f'{x:.4f}' for x in point['objectives']]
    accuracy = f'{100 * point["test_accuracy"]:.2f} %'
    cells.append([name, *numbers, accuracy, point.get('species', '')])
  sizes = [max(len(row[i]) for row in cells) for i in range(len(head))]
  lines = []
  for row in cells:
    padded = [row[0].ljust(sizes[0])]
    padded += [c.rjust(s) for c, s in zip(row[1:], sizes[1:], strict=True)]
    lines.append('  '.join(padded).rstrip())
  lines.insert(1, '-' * max(map(len, lines)))
  return '\n'.join(lines)


def compare_table(summary: list[dict]) -> str:
  """What `arena.summarise` found, in Markdown, a table for each score.

  A cell has mean and 95 % interval; behind it, for all but the first method, on
  how many seeds the first is ahead.
  """
  methods = list(dict.fromkeys(row['method'] for row in summary))
  scores = list(dict.fromkeys(row['score'] for row in summary))
  at = {(r['method'], r['evaluations'], r['score']): r for r in summary}
  lines = []
  for score in scores:
    rows = [row for row in summary if row['score'] == score]
    marks = list(dict.fromkeys(row['evaluations'] for row in rows))
    lines.append(f'| {score} | {" | ".join(f"{m:,}" for m in marks)} |')
    lines.append('|---' * (1 + len(marks)) + '|')
    for method in methods:
      cells = []
      for mark in marks:
        row = at[method, mark, score]
        cell = f'{row["mean"]:.4f} ± {row["interval"]:.4f}'
        if method != methods[0]:
          cell += f' ({row["ahead"]} of {row["seeds"]})'
        cells.append(cell)
      lines.append(f'| {method} | {" | ".join(cells)} |')
    lines.append('')
  return '\n'.join(lines)


def _color(index: int):
  """A color for each of up to twenty methods."""
  return plt.get_cmap('tab20')(index % 20)


def plot_curves(workdir, results: dict, methods: Sequence[str]):
  """Hypervolume against evaluations: the mean, and its 95 % interval.

  The second panel is what lies within a twentieth of the best.
  """
  figure, panels = plt.subplots(1, 2, figsize=(13, 5))
  last = max(c['curve'][-1][0] for m in methods for c in results[m].values())
  grid, best = np.geomspace(1, last, 400), 0.0
  for i, method in enumerate(methods):
    rows = []
    for cell in results[method].values():
      count, volume = np.asarray(cell['curve']).T
      # What was found stays found; before the first there is nothing.
      place = np.searchsorted(count, grid, side='right') - 1
      rows.append(np.where(place < 0, 0, volume[np.maximum(place, 0)]))
    mean, half = np.mean(rows, axis=0), arena.interval(np.stack(rows))
    best = max(best, mean[-1])
    for axes in panels:
      axes.step(grid, mean, where='post', color=_color(i), label=method, lw=1.5)
      band = (mean - half, mean + half)
      axes.fill_between(grid, *band, color=_color(i), alpha=0.15, lw=0)
  panels[1].set_ylim(0.95 * best, 1.005 * best)
  for axes in panels:
    axes.set_xscale('log')
    axes.set_xlabel('evaluations, with those that knowledge took')
    axes.grid(alpha=0.3)
  panels[0].set_ylabel('hypervolume on the search images')
  panels[0].legend(fontsize=8)
  figure.tight_layout()
  return _save(figure, workdir, 'curves.png')


def plot_attainment(workdir, results: dict, methods, names):
  """What half of the seeds attain, against each cost."""
  figure, panels = plt.subplots(
    1, len(names) - 1, figsize=(5.5 * (len(names) - 1), 4.2), squeeze=False
  )
  for k, axes in enumerate(panels[0], start=1):
    for i, method in enumerate(methods):
      fronts = [
        np.asarray(cell['front']).reshape(-1, len(names))
        for cell in results[method].values()
      ]
      costs = np.concatenate([front[:, k] for front in fronts])
      if not len(costs):
        continue
      grid = np.linspace(costs.min(), costs.max(), 300)
      best = arena.attainment(fronts, grid, k)
      axes.step(grid, best, where='post', color=_color(i), label=method)
    axes.set_yscale('log')
    axes.set_xlabel(_label(names[k]))
    axes.set_ylabel(_label(names[0]))
    axes.grid(alpha=0.3)
  panels[0][0].legend(fontsize=8)
  figure.tight_layout()
  return _save(figure, workdir, 'attainment.png')


def plot_compare(
  workdir: str | os.PathLike,
  results: dict,
  methods: Sequence[str],
  names: Sequence[str],
) -> list[pathlib.Path]:
  """Pictures of methods side by side: curves, and median attainment.

  Args:
    workdir: where to.
    results: {method: {seed: {'curve', 'front'}}}.
    methods: which of them.
    names: of the objectives, performance first.
  """
  return draw(
    [
      (plot_curves, workdir, results, methods),
      (plot_attainment, workdir, results, methods, names),
    ]
  )
