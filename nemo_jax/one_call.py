"""`search`: from a trained network to a Pareto front, in one call."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from nemo_jax.core import batches, checks
from nemo_jax.core.types import InputError, PyTree
from nemo_jax.quantization.numerics import widths
from nemo_jax.quantization.trace.tracing import Apply
from nemo_jax.tasks import objectives as objectives_lib

if TYPE_CHECKING:
  from nemo_jax.data.labelled import Images
  from nemo_jax.runs.front import Front


def divide(
  inputs: PyTree, labels: Any, seed: int, calibration: int = 256
) -> 'tuple[Images, Images]':
  """A random division of images for calibration and for the search.

  Args:
    inputs: a pytree of arrays [B, ...].
    labels: [B] integers.
    seed: of the division.
    calibration: number of images for calibration; at most a quarter are taken.

  Raises:
    InputError: there are fewer than two images, or not a label for each.
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
  # Loaded by those who search, and not by those who quantize.
  from nemo_jax.data.labelled import Images

  one, two = (Images(batches.take(inputs, part), known[part]) for part in parts)
  return one, two


def _unseen(inputs: PyTree, labels: Any, like: PyTree) -> 'Images':
  """The test images, after a check that they have the shapes of `like`.

  Raises:
    InputError: they do not, or there is not a label for each.
  """
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
  from nemo_jax.data.labelled import Images

  return Images(batches.on_host(inputs), np.asarray(labels))


def search(
  apply: Apply,
  variables: PyTree,
  inputs: PyTree,
  labels: Any,
  *,
  test: tuple[PyTree, Any] | None = None,
  evaluations: int = 1000,
  objectives: Sequence[str] = objectives_lib.DEFAULT,
  bit_widths: Sequence[int] = widths.DEFAULT,
  workdir: str | os.PathLike | None = None,
  seed: int = 0,
  name: str = 'model',
  **config: Any,
) -> 'Front':
  """Pareto front of mixed-precision configurations of a trained network.

  The inputs are divided at random. On the smaller part, of at most 256 examples
  and a quarter of all, the network is calibrated and reconstructed and the
  sensitivities are estimated. The other part scores candidates.

  Args:
    apply: (variables, inputs) -> logits [B, C]; see `quantize`.
    variables: a pytree of arrays, the weights.
    inputs: a pytree of arrays [B, ...], such as training images.
    labels: [B] integers, classes from 0.
    test: inputs and labels on which the points of the front are scored at the
      end. They have no influence on the search.
    evaluations: budget, of which whole generations of `population` are used.
    objectives: of `objectives.NAMES`, performance first.
    bit_widths: to choose from, ascending.
    workdir: folder in which the run is stored; the same call resumes it. None
      stores nothing.
    seed: of the search, and of the division of the inputs.
    name: of the network, in results.
    **config: further fields of `config.Config`.

  Raises:
    InputError: an argument cannot be used.
  """
  # Imported here, since `quantize` needs none of them.
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
