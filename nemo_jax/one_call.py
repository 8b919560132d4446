"""One call from a trained network to a front of bit-widths."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from nemo_jax.core import batches, checks
from nemo_jax.core.types import Array, InputError, PyTree
from nemo_jax.data.labelled import Images
from nemo_jax.quantization.numerics import widths
from nemo_jax.quantization.trace.tracing import Apply
from nemo_jax.tasks import objectives as objectives_lib

if TYPE_CHECKING:
  from nemo_jax.runs.front import Front


def divide(
  inputs: PyTree, labels: Array, seed: int, calibration: int = 256
) -> tuple[Images, Images]:
  """Images to calibrate with, and others for the search, at random.

  Args:
    inputs: [B, ...].
    labels: [B] int.
    seed: of the division.
    calibration: how many calibrate, at most a quarter of all.

  Raises:
    InputError: there are fewer than two, or not as many labels.
  """
  count = batches.check(inputs)
  if count < 2 or np.shape(labels) != (count,):
    raise InputError(
      f'there are {count} inputs and labels of shape {np.shape(labels)}; give '
      'two examples or more, and a label for each'
    )
  rows = np.random.default_rng(seed).permutation(count)
  first = max(1, min(calibration, count // 4))
  parts = np.sort(rows[:first]), np.sort(rows[first:])
  inputs, known = batches.on_host(inputs), np.asarray(labels)
  one, two = (Images(batches.take(inputs, part), known[part]) for part in parts)
  return one, two


def _unseen(inputs: PyTree, labels: Array, like: PyTree) -> Images:
  """Images for the end; they are refused before a search if they do not fit."""
  count = batches.check(inputs)
  if np.shape(labels) != (count,):
    raise InputError(
      f'test has {count} inputs and labels of shape {np.shape(labels)}; give a '
      'label for each'
    )
  shapes = [jax.tree.map(lambda x: x.shape[1:], x) for x in (inputs, like)]
  if shapes[0] != shapes[1]:
    raise InputError(
      f'test has inputs of shape {shapes[0]}; those of the search are '
      f'{shapes[1]}'
    )
  return Images(batches.on_host(inputs), np.asarray(labels))


def search(
  apply: Apply,
  variables: PyTree,
  inputs: PyTree,
  labels: Array,
  *,
  test: tuple[PyTree, Array] | None = None,
  evaluations: int = 1000,
  objectives: Sequence[str] = objectives_lib.DEFAULT,
  bit_widths: Sequence[int] = widths.DEFAULT,
  workdir: str | os.PathLike | None = None,
  seed: int = 0,
  name: str = 'model',
  **config: Any,
) -> 'Front':
  """The Pareto front of bit-widths of a trained network.

  The network is calibrated and reconstructed on a part of the inputs, at most
  256 and a quarter of them, from which sensitivities are estimated too; the
  others score candidates.

  Args:
    apply: (variables, inputs) -> logits [B, C]; see `quantize`.
    variables: a pytree of arrays.
    inputs: a pytree of arrays [B, ...], labelled examples; training data are
      right.
    labels: [B] int, classes from 0.
    test: inputs and labels on which the front is scored at the end, and on
      which nothing is chosen.
    evaluations: budget, in whole generations of `population`.
    objectives: of `objectives.NAMES`, performance first.
    bit_widths: that there are to choose from.
    workdir: folder in which the run is kept; the same call resumes it.
    seed: of the search, and of the division of the inputs.
    name: of the network, in results.
    **config: further fields of `config.Config`.

  Raises:
    InputError: an argument cannot be used.
  """
  # Loaded by those who search, and not by those who quantize.
  from nemo_jax import search_run
  from nemo_jax.config import Config
  from nemo_jax.workloads import Workload

  checks.whole('evaluations', evaluations)
  fields: dict[str, Any] = {
    'population': min(Config.population, evaluations),
    **config,
  }
  chosen = Config(
    evaluations=evaluations,
    objectives=tuple(objectives),
    bit_widths=tuple(bit_widths),
    seed=seed,
    **fields,
  )
  chosen.check_search()
  calibration, rest = divide(inputs, labels, seed)
  workload = Workload(
    name=name,
    apply=apply,
    variables=variables,
    calibration=calibration,
    search=rest,
    test=None if test is None else _unseen(*test, like=inputs),
  )
  cache = None if workdir is None else os.path.join(workdir, 'cache')
  return search_run.run(workload, chosen, workdir=workdir, cache=cache)
