"""Pictures of compared methods: hypervolume curves and attainment."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from nemo_jax.arena import statistics
from nemo_jax.runs.plots import draw, label, save

# {method: {seed: {'curve', 'front'}}}
Results = Mapping[str, Mapping[str, Mapping[str, Any]]]


def _color(index: int) -> Any:
  """The color of a method; they repeat after twenty."""
  return matplotlib.colormaps['tab20'](index % 20)


def plot_curves(
  workdir: str | os.PathLike, results: Results, methods: Sequence[str]
) -> pathlib.Path:
  """Hypervolume against evaluations: means and their 95 % intervals.

  The second panel shows hypervolumes from 95 % of the best. Arguments as for
  `plot_compare`.
  """
  figure = Figure(figsize=(13, 5))
  panels = figure.subplots(1, 2)
  last = max(c['curve'][-1][0] for m in methods for c in results[m].values())
  grid, best = np.geomspace(1, last, 400), 0.0
  for i, method in enumerate(methods):
    rows = []
    for cell in results[method].values():
      count, volume = np.asarray(cell['curve']).T
      # A step function, which is 0 before the first measurement.
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
    axes.set_xlabel('evaluations, with those of sensitivities')
    axes.grid(alpha=0.3)
  panels[0].set_ylabel('hypervolume on the search images')
  panels[0].legend(fontsize=8)
  figure.tight_layout()
  return save(figure, workdir, 'curves.png')


def plot_attainment(
  workdir: str | os.PathLike,
  results: Results,
  methods: Sequence[str],
  names: Sequence[str],
) -> pathlib.Path:
  """Median attainment of the first objective, against each cost.

  Arguments as for `plot_compare`.
  """
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
  results: Results,
  methods: Sequence[str],
  names: Sequence[str],
) -> list[pathlib.Path]:
  """Draws hypervolume curves and median attainment; returns the pictures.

  Args:
    workdir: folder of the pictures.
    results: {method: {seed: {'curve', 'front'}}}.
    methods: those that are drawn.
    names: of the objectives, performance first.
  """
  return draw(
    [
      (plot_curves, workdir, results, methods),
      (plot_attainment, workdir, results, methods, names),
    ]
  )
