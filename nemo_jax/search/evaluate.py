"""A whole population through `problem.evaluate`."""

import functools

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from nemo_jax.core import devices
from nemo_jax.core.types import Array
from nemo_jax.search.problem import Problem

# An accelerator waits for the programs of a small network to be started: for
# ResNet-20 on 1,000 images, 4e10 multiply-accumulates, an H200 took 1.48 times
# as long for candidates one by one as for 16 at once.
_SMALL, _AT_ONCE = 1e11, 16


def candidates_at_once(macs: int) -> int | None:
  """The `batch_size` of `evaluate` that suits this backend.

  Args:
    macs: multiply-accumulates of one candidate, on all its images.
  """
  alone = jax.default_backend() == 'cpu' or macs > _SMALL
  return None if alone else _AT_ONCE


def evaluate(
  problem: Problem, choices: Array, batch_size: int | None = None
) -> Array:
  """Objectives [P, M] of `choices` [P, N].

  Args:
    problem: prices one candidate at a time.
    choices: [P, N] int32.
    batch_size: candidates evaluated at once, by `vmap`, as
      `candidates_at_once` advises; one after the other if absent, which is what
      a CPU likes: `vmap` over weights would turn every convolution into a
      grouped one.
  """

  def many(data, choices):
    one = lambda candidate: problem.evaluate(data, candidate)
    return jax.lax.map(one, choices, batch_size=batch_size)

  mesh = problem.mesh
  if mesh is None:
    return many(problem.data, choices)
  count, shares = len(choices), mesh.shape[devices.CANDIDATE]
  # Every device takes as many; the last row fills what is left over.
  rows = np.minimum(np.arange(-(-count // shares) * shares), count - 1)
  by_candidate = PartitionSpec(devices.CANDIDATE)
  # What comes before and after stays whole: divided sums would differ.
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
