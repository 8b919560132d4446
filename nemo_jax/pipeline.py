"""Preparation of a trained network: quantizers, prior, problem."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

import nemo_jax
from nemo_jax.config import Config
from nemo_jax.core import devices, files, memory
from nemo_jax.core.types import ArrayLike, InputError
from nemo_jax.data.labelled import Images
from nemo_jax.quantization import sensitivity
from nemo_jax.quantization.numerics import bank as bank_lib
from nemo_jax.quantization.ptq import reconstruct
from nemo_jax.quantization.quantized import Quantized
from nemo_jax.quantization.structure import Structure
from nemo_jax.quantization.trace import tracing
from nemo_jax.quantization.transform import quantize
from nemo_jax.search import species as species_lib
from nemo_jax.search.evaluate import candidates_at_once
from nemo_jax.search.problem import Problem
from nemo_jax.tasks import mixed_precision, scoring
from nemo_jax.workloads import Workload


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
  """A quantized network with its search problem.

  Attributes:
    workload: the network and its images.
    config: from which the rest is made.
    quantized: the network with its quantizers and their bank.
    sensitivities: float32[N, K], the loss that each bit-width adds; or None.
    problem: on the search images.
    batch_size: candidates evaluated at once; None for one after the other.
  """

  workload: Workload
  config: Config
  quantized: Quantized
  sensitivities: ArrayLike | None
  problem: Problem
  batch_size: int | None


def images_at_once(
  structure: Structure, config: Config, candidates: int = 1
) -> int:
  """Number of images that a candidate can be run on at once.

  Args:
    structure: of the network.
    config: with a limit of memory, if any.
    candidates: how many candidates are evaluated at once.
  """
  budget = None
  if config.memory_gib is not None:
    budget = int(config.memory_gib * 2**30)
  return memory.images_at_once(structure.bytes_per_image, budget, candidates)


def _key(*content: Any) -> str:
  """Digest of arrays, settings (the last) and the version of the package."""
  arrays, settings = content[:-1], content[-1]
  text = repr((nemo_jax.__version__, settings))
  text = np.frombuffer(text.encode(), np.uint8)
  return files.digest((arrays, text))[:32]


def quantize_network(
  workload: Workload, config: Config, cache: str | os.PathLike | None
) -> Quantized:
  """The quantized network, calibrated and reconstructed.

  Args:
    workload: the network, and the calibration images.
    config: see `Config`.
    cache: folder in which reconstructed banks are kept; None keeps none.

  Raises:
    InputError: the network or its images cannot be used.
  """
  images = workload.calibration.images
  quantized = quantize(
    workload.apply,
    workload.variables,
    images,
    extra_ops=config.extra_ops,
    calibration=config.calibration,
    weight_scheme=config.weight_scheme,
    lowering=config.lowering,
  )
  if not config.reconstruct:
    return quantized

  def make() -> Quantized:
    return reconstruct.reconstruct(
      quantized,
      workload.variables,
      images,
      steps=config.reconstruct,
      chunk=min(16, images_at_once(quantized.structure, config)),
    )

  if cache is None:
    return make()
  sites = quantized.analysis.sites
  weights = jax.eval_shape(quantized.weights, workload.variables)
  settings = sorted(config.reconstruct), sites
  key = _key(workload.variables, images, quantized.bank, settings)

  def parse(columns: dict[str, np.ndarray]) -> Quantized:
    bank = bank_lib.from_columns(columns)
    bank_lib.check_fits(bank, quantized.bank, sites, weights)
    return quantized.with_bank(bank)

  path = files.local(cache) / 'banks' / f'{key}.npz'
  return files.cached(path, lambda: bank_lib.columns_of(make().bank), parse)


def find_sensitivities(
  workload: Workload,
  quantized: Quantized,
  config: Config,
  cache: str | os.PathLike | None,
) -> Float[ArrayLike, 'N K'] | None:
  """The loss that each bit-width of a quantizer adds, float32.

  None if the config asks for none.

  Args:
    workload: the network, and the calibration images.
    quantized: from `quantize_network`.
    config: see `Config`.
    cache: folder in which sensitivities are kept; None keeps none.
  """
  if config.sensitivities == 'none':
    return None
  images, labels = workload.calibration

  def make() -> dict[str, Any]:
    table = sensitivity.METHODS[config.sensitivities](
      quantized,
      workload.variables,
      images,
      labels,
      key=jax.random.key(0),
      widths=config.bit_widths,
    )
    return {'sensitivities': table}

  def parse(arrays: dict[str, np.ndarray]) -> np.ndarray:
    shape = len(quantized.quantizers), len(config.bit_widths)
    table = arrays.get('sensitivities')
    if table is None or table.shape != shape or table.dtype != np.float32:
      raise InputError(f'it holds no sensitivities of shape {shape}')
    return table

  if cache is None:
    found = parse({k: np.asarray(v) for k, v in make().items()})
  else:
    settings = (
      config.sensitivities,
      tuple(config.bit_widths),
      quantized.analysis.sites,
      config.lowering,
    )
    key = _key(workload.variables, images, labels, quantized.bank, settings)
    path = files.local(cache) / 'sensitivities' / f'{key}.npz'
    found = files.cached(path, make, parse)
  # Results of devices differ in the last bits, so all processes take the first.
  return devices.from_first(found)


def sensitivity_evaluations(
  workload: Workload, quantized: Quantized, method: str, widths: Sequence[int]
) -> int:
  """Number of evaluations of a search that cost as much as sensitivities.

  Counted in forward passes over images.

  Args:
    workload: with its calibration and search images.
    quantized: from `quantize_network`.
    method: of `sensitivity.METHODS`.
    widths: bit-widths.
  """
  passes = sensitivity.passes(method, len(quantized.quantizers), len(widths))
  calibration, search = (
    len(images.labels) for images in (workload.calibration, workload.search)
  )
  return -(-passes * calibration // search)


def make_problem(
  workload: Workload,
  quantized: Quantized,
  config: Config,
  sensitivities: Float[ArrayLike, 'N K'] | None,
  *,
  images: Images | None = None,
  objectives: Sequence[str] | None = None,
  candidates: int = 1,
  mesh: jax.sharding.Mesh | None = None,
) -> Problem:
  """The search problem of a workload and a config.

  Args:
    workload: the network.
    quantized: from `quantize_network`.
    config: see `Config`.
    sensitivities: from `find_sensitivities`.
    images: on which candidates are scored; the search images if None.
    objectives: those of the config if None.
    candidates: how many are evaluated at once.
    mesh: devices that share the work.

  Raises:
    InputError: see `mixed_precision.make_problem`.
  """
  return mixed_precision.make_problem(
    quantized,
    workload.variables,
    *(images or workload.search),
    objectives=objectives or config.objectives,
    bit_widths=config.bit_widths,
    data_flow=config.data_flow,
    images_at_once=images_at_once(quantized.structure, config, candidates),
    mesh=mesh,
    sensitivities=sensitivities,
  )


def prepare(
  workload: Workload,
  config: Config,
  cache: str | os.PathLike | None = None,
  mesh: jax.sharding.Mesh | None = None,
) -> Prepared:
  """The quantized network, its sensitivities, and its search problem.

  Args:
    workload: the network and its images.
    config: see `Config`.
    cache: folder in which banks and sensitivities are kept; None keeps none.
    mesh: devices that share the work, from `devices.make_mesh`.

  Raises:
    InputError: the network or its images cannot be used.
  """
  quantized = quantize_network(workload, config, cache)
  if workload.test is not None:
    # Checked now, not when they are used after the search.
    inputs, labels = workload.test
    count = tracing.check_arguments(workload.variables, inputs)
    scoring.check_labels(labels, count, quantized.structure.num_classes())
  macs = sum(operation.macs for operation in quantized.operations)
  count = len(workload.search.labels)
  batch_size = config.batch_size or candidates_at_once(macs * count)
  known = None
  if not species_lib.is_blind(config.species):
    known = find_sensitivities(workload, quantized, config, cache)
  problem = make_problem(
    workload,
    quantized,
    config,
    known,
    candidates=batch_size or 1,
    mesh=mesh,
  )
  return Prepared(
    workload=workload,
    config=config,
    quantized=quantized,
    sensitivities=known,
    problem=problem,
    batch_size=batch_size,
  )


def keep_programs(cache: str | os.PathLike) -> None:
  """Keeps compiled programs in a folder from now on.

  No change if JAX already has a folder for them.

  Args:
    cache: folder in which a folder `xla` is made.
  """
  if getattr(jax.config, 'jax_compilation_cache_dir') is not None:  # noqa: B009
    return
  folder = pathlib.Path(files.local(cache)).absolute() / 'xla'
  jax.config.update('jax_compilation_cache_dir', os.fspath(folder))
  # All programs, for even small ones take longer to compile than to read.
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
