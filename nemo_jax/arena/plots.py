"""Pictures of methods side by side: curves, and what they attain."""

import os
import pathlib
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from nemo_jax.arena import statistics
from nemo_jax.runs.plots import draw, label, save


def _color(index: int):
  """A color for each of up to twenty methods."""
  return matplotlib.colormaps['tab20'](index % 20)


def plot_curves(workdir, results: dict, methods: Sequence[str]):
  """Hypervolume against evaluations: the mean, and its 95 % interval.

  The second panel is what lies within a twentieth of the best.
  """
  figure = Figure(figsize=(13, 5))
  panels = figure.subplots(1, 2)
  last = max(c['curve'][-1][0] for m in methods for c in results[m].values())
  grid, best = np.geomspace(1, last, 400), 0.0
  for i, method in enumerate(methods):
    rows = []
    for cell in results[method].values():
      count, volume = np.asarray(cell['curve']).T
      # What was found stays found; before the first there is nothing.
      place = np.searchsorted(count, grid, side='right') - 1
      rows.append(np.where(place < 0, 0, volume[np.maximum(place, 0)]))
    mean, half = np.mean(rows, axis=0), statistics.interval(np.stack(rows))
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
  return save(figure, workdir, 'curves.png')


def plot_attainment(workdir, results: dict, methods, names):
  """What half of the seeds attain, against each cost."""
  figure = Figure(figsize=(5.5 * (len(names) - 1), 4.2))
  panels = figure.subplots(1, len(names) - 1, squeeze=False)
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
      best = statistics.attainment(fronts, grid, k)
      axes.step(grid, best, where='post', color=_color(i), label=method)
    axes.set_yscale('log')
    axes.set_xlabel(label(names[k]))
    axes.set_ylabel(label(names[0]))
    axes.grid(alpha=0.3)
  panels[0][0].legend(fontsize=8)
  figure.tight_layout()
  return save(figure, workdir, 'attainment.png')


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
