"""Objectives of a whole population, by `problem.evaluate`."""

import functools

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Float, Integer

from nemo_jax.core import devices
from nemo_jax.core.types import Array, ArrayLike
from nemo_jax.search.problem import Problem

# For a small network, an accelerator spends much of its time starting kernels:
# for ResNet-20 on 1,000 images, 4e10 multiply-accumulates, an H200 took 1.48
# times as long for candidates one by one as for 16 at once.
_SMALL, _AT_ONCE = 1e11, 16


def candidates_at_once(macs: int) -> int | None:
  """Recommended `batch_size` of `evaluate` for this backend.

  Args:
    macs: multiply-accumulates of one candidate, on all images.
  """
  alone = jax.default_backend() == 'cpu' or macs > _SMALL
  return None if alone else _AT_ONCE


def evaluate(
  problem: Problem,
  choices: Integer[ArrayLike, 'P N'],
  batch_size: int | None = None,
) -> Float[Array, 'P M']:
  """Objectives of all candidates.

  Args:
    problem: its `evaluate` takes one candidate at a time.
    choices: of each candidate.
    batch_size: candidates evaluated at once, by `vmap`; see
      `candidates_at_once`. If absent they are evaluated one by one, which is
      faster on a CPU: `vmap` over weights turns every convolution into a
      grouped one.
  """

  def many(data, choices):
    one = lambda candidate: problem.evaluate(data, candidate)
    return jax.lax.map(one, choices, batch_size=batch_size)

  mesh = problem.mesh
  if mesh is None:
    return many(problem.data, choices)
  count, shares = len(choices), mesh.shape[devices.CANDIDATE]
  # Every device takes the same number of rows; copies of the last row fill up.
  rows = np.minimum(np.arange(-(-count // shares) * shares), count - 1)
  by_candidate = PartitionSpec(devices.CANDIDATE)
  # Inputs and outputs are replicated, because sums over a divided axis would be
  # rounded differently.
  whole = functools.partial(
    jax.lax.with_sharding_constraint,
    shardings=NamedSharding(mesh, PartitionSpec()),
  )
  spread = jax.shard_map(
    many,
    mesh=mesh,
    in_specs=(problem.data_specs, by_candidate),
    out_specs=by_candidate,
    check_vma=False,
  )
  return whole(spread(problem.data, whole(choices)[rows]))[:count]
