"""From a trained network to its search problem, by a `Config`."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

import nemo_jax
from nemo_jax.config import Config
from nemo_jax.core import devices, files, memory
from nemo_jax.core.types import Array, InputError
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
  """A network that is ready to be searched.

  Attributes:
    workload: the network and its images.
    config: that decided the rest.
    quantized: the network with its quantizers, and a bank.
    sensitivities: float32[N, K], or None.
    problem: on the images of the search.
    batch_size: candidates evaluated at once, or None for one by one.
  """

  workload: Workload
  config: Config
  quantized: Quantized
  sensitivities: Array | None
  problem: Problem
  batch_size: int | None


def images_at_once(
  structure: Structure, config: Config, candidates: int = 1
) -> int:
  """How many images fit the memory, where so many candidates see each."""
  budget = None
  if config.memory_gib is not None:
    budget = int(config.memory_gib * 2**30)
  return memory.images_at_once(structure.bytes_per_image, budget, candidates)


def _key(*content: Any) -> str:
  """A name for what is made of the content by this version."""
  arrays, settings = content[:-1], content[-1]
  text = repr((nemo_jax.__version__, settings))
  text = np.frombuffer(text.encode(), np.uint8)
  return files.digest((arrays, text))[:32]


def quantize_network(
  workload: Workload, config: Config, cache: str | os.PathLike | None
) -> Quantized:
  """The quantized network, its bank calibrated and reconstructed.

  Args:
    workload: its calibration images decide ranges and codes.
    config: see `Config`.
    cache: folder in which reconstructed banks are kept; None for none.
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

  def make():
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

  def parse(columns):
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
) -> Array | None:
  """float32[N, K]: what each width loses at each quantizer; or None.

  Arguments as for `quantize_network`.
  """
  if config.sensitivities == 'none':
    return None
  images, labels = workload.calibration

  def make():
    table = sensitivity.METHODS[config.sensitivities](
      quantized,
      workload.variables,
      images,
      labels,
      key=jax.random.key(0),
      widths=config.bit_widths,
    )
    return {'sensitivities': table}

  def parse(arrays):
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
  # Devices differ in the last bits, and all processes have to agree.
  return devices.from_first(found)


def sensitivity_evaluations(
  workload: Workload, quantized: Quantized, method: str, widths: Sequence[int]
) -> int:
  """How many evaluations of a search sensitivities by a method cost."""
  passes = sensitivity.passes(method, len(quantized.quantizers), len(widths))
  calibration, search = (
    len(images.labels) for images in (workload.calibration, workload.search)
  )
  return -(-passes * calibration // search)


def make_problem(
  workload: Workload,
  quantized: Quantized,
  config: Config,
  sensitivities: Array | None,
  *,
  images: Images | None = None,
  objectives: Sequence[str] | None = None,
  candidates: int = 1,
  mesh: jax.sharding.Mesh | None = None,
) -> Problem:
  """The problem of a config on images of the workload.

  Args:
    workload: the network.
    quantized: from `quantize_network`.
    config: see `Config`.
    sensitivities: from `find_sensitivities`.
    images: those of the search if absent.
    objectives: those of the config if absent.
    candidates: evaluated at once.
    mesh: devices that share the work.
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
  """The quantized network, its sensitivities, and the problem.

  Args:
    workload: the network and its images.
    config: see `Config`.
    cache: folder for what is costly to make; None for none.
    mesh: devices that share the work, from `devices.make_mesh`.

  Raises:
    InputError: the network or its images cannot be used.
  """
  quantized = quantize_network(workload, config, cache)
  if workload.test is not None:
    # They are scored last, when it would be too late.
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
  """From now on compiled programs are kept in a folder, where none is set."""
  if getattr(jax.config, 'jax_compilation_cache_dir') is not None:  # noqa: B009
    return
  folder = pathlib.Path(files.local(cache)).absolute() / 'xla'
  jax.config.update('jax_compilation_cache_dir', os.fspath(folder))
  # Many small programs take longer to compile than to read.
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
