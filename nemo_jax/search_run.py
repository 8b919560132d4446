"""A whole search run: preparation, generations, storage and scoring."""

import contextlib
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import tqdm

from nemo_jax import pipeline, result, runs
from nemo_jax.config import Config
from nemo_jax.core import devices, files, plugins
from nemo_jax.core.log import Log
from nemo_jax.pipeline import Prepared
from nemo_jax.runs.front import Front
from nemo_jax.runs.model import Model
from nemo_jax.search import nemo
from nemo_jax.search.compilation import Compiled
from nemo_jax.search.state import State
from nemo_jax.workloads import Workload

# Largest capacity of the archive.
_ARCHIVE = 4096


def digests(workload: Workload) -> dict[str, str]:
  """SHA-256 of weights, and of the images and labels of each use, by name."""
  content = {'weights': workload.variables}
  for use in result.USES:
    if (given := getattr(workload, use)) is not None:
      images, labels = given
      content |= {f'images of the {use}': images}
      content |= {f'labels of the {use}': labels}
  return {name: files.digest(tree) for name, tree in content.items()}


def run(
  workload: Workload,
  config: Config,
  *,
  workdir: str | os.PathLike | None = None,
  cache: str | os.PathLike | None = None,
  settings: Mapping[str, Any] | None = None,
  log: Log | None = None,
) -> Front:
  """The Pareto front of a workload.

  With a folder the run is stored there, and resumed if it was stopped.

  Args:
    workload: the network and its images.
    config: see `Config`.
    workdir: folder of the run, see `runs.folder`; None stores nothing.
    cache: folder in which banks and sensitivities are kept; None keeps none.
    settings: flags of the run, which a resumed run must have as well; those of
      the config if None.
    log: for progress messages; None writes none.

  Raises:
    InputError: the network, its images or the config cannot be used, or the
      folder holds another run.
  """
  config.check_quantization()
  config.check_search()
  log = log or Log()
  settings = config.settings() if settings is None else dict(settings)
  read = digests(workload) | plugins.digests('species', config.species)
  if workdir is not None:
    # Also if weights or images were changed in place, it is another run.
    runs.check_flags(workdir, settings, read)
  mesh = devices.make_mesh(config.image_devices)
  with log.stage('calibrating the quantizers'):
    prepared = pipeline.prepare(workload, config, cache, mesh)
  introduce(prepared, log)
  own = {
    'bank': prepared.quantized.bank,
    'sensitivities': prepared.sensitivities,
  }
  read |= {name: files.digest(tree) for name, tree in own.items()}
  devices.check_equal(
    files.seal(read)['sha256'], 'weights, images or sensitivities'
  )
  # Before the folder is made, so that a refused run makes none.
  search = nemo.make(
    prepared.problem,
    list(config.team().values()),
    config.population,
    exploration=config.exploration,
    archive_size=min(config.generations * config.population, _ARCHIVE),
    batch_size=prepared.batch_size,
  )
  if workdir is None:
    return result.describe(
      prepared, evolve(prepared, search, None, None, log), log
    )
  return _stored(prepared, search, workdir, settings, read, log)


def _stored(
  prepared: Prepared,
  search: nemo.Search,
  workdir: str | os.PathLike,
  settings: Mapping[str, Any],
  read: Mapping[str, str],
  log: Log,
) -> Front:
  """The front of a run that is stored in a folder, and resumed if it has begun.

  Args:
    prepared: from `pipeline.prepare`.
    search: of its problem.
    workdir: the folder.
    settings: flags of the run.
    read: digests of the files that the run reads.
    log: for progress messages.
  """
  is_first = jax.process_index() == 0
  with contextlib.ExitStack() as stack:
    run_digest, front = None, None
    if is_first:
      started = runs.started(workdir, settings, read)
      run_digest, front = stack.enter_context(started)
    if devices.from_first(np.asarray(front is not None)):
      generations = prepared.config.generations
      log.line(f'all {generations} generations of this run are done')
    else:
      state = evolve(prepared, search, workdir, run_digest, log)
      front = result.describe(prepared, state, log, run_digest)
      if is_first:
        front.save(workdir)
        front = Front.load(workdir)
  if front is None:  # only the first process stores and loads it
    return Front(
      workload=prepared.workload.name,
      objective_names=prepared.problem.objective_names,
      quantizers=(),
      points=(),
    )
  model = Model(prepared.quantized, prepared.workload.variables)
  return front.with_model(model)


def introduce(prepared: Prepared, log: Log) -> None:
  """Writes the sizes of network and images to the log."""
  workload, quantized = prepared.workload, prepared.quantized
  log.line(
    f'{workload.name}: {len(quantized.quantizers)} quantizers, '
    f'{quantized.costs.parameters:,} parameters, '
    f'{quantized.costs.macs.sum():,} MACs an image'
  )
  weights = sum(q.is_weight for q in quantized.quantizers)
  log.line(f'{len(quantized.bank.codes)} of {weights} weights reconstructed')
  count = len(workload.search.labels)
  at_once = pipeline.images_at_once(
    quantized.structure, prepared.config, prepared.batch_size or 1
  )
  log.line(
    f'{count} images score a candidate, at most {min(at_once, count)} at once'
  )


def describe_memory(program: jax.stages.Compiled) -> str:
  """Message on the peak memory of a compiled evaluation on each device."""
  used = program.memory_analysis()
  if used is None:
    return 'not known on this backend'
  arguments = used.argument_size_in_bytes
  total = arguments + used.output_size_in_bytes + used.temp_size_in_bytes
  mib = 2**20
  return (
    f'{total / mib:,.0f} MiB, {arguments / mib:,.0f} of it weights and images'
  )


def _restore(
  workdir: str | os.PathLike, state: State, run_digest: str | None, log: Log
) -> tuple[Any, State]:
  """Checkpoints of a folder, and the last stored state, else the given one."""
  checkpoints = runs.open_checkpoints(workdir)
  state, damaged = runs.restore(checkpoints, state, run_digest)
  for line in damaged:
    log.line(f'{line}; going back to the one before')
  runs.discard_after(checkpoints, int(state.generation))
  runs.rewind_metrics(workdir, int(state.generation))
  return checkpoints, state


def evolve(
  prepared: Prepared,
  search: nemo.Search,
  workdir: str | os.PathLike | None,
  run_digest: str | None,
  log: Log,
) -> State:
  """The final state of a search, which resumes from the last checkpoint.

  Args:
    prepared: from `pipeline.prepare`.
    search: of its problem.
    workdir: folder in which generations are stored; None stores nothing.
    run_digest: of the run's flags and files.
    log: for progress messages.
  """
  config = prepared.config
  init_key, run_key = jax.random.split(jax.random.key(config.seed))
  state, checkpoints = search.init(init_key), None
  is_first = jax.process_index() == 0
  if workdir is not None:
    if is_first:
      checkpoints, state = _restore(workdir, state, run_digest, log)
    state = devices.from_first(jax.device_get(state))
  done, generations = int(state.generation), config.generations
  if done >= generations:
    return state
  if done:
    log.line(f'resuming after generation {done}')
  with log.stage('compiling one generation'):
    compiled: Compiled = search.compile(run_key, state)
  log.line(
    f'memory of a device at its peak: {describe_memory(compiled.evaluation)}'
  )
  with tqdm.tqdm(
    total=generations * config.population,
    initial=done * config.population,
    desc='searching',
    unit='eval',
    disable=None if is_first else True,
  ) as bar:
    last = runs.evolve(
      workdir, checkpoints, compiled.step, state, generations, run_digest
    )
    for new, metrics in last:
      state = new
      bar.set_postfix(
        front=int(metrics['front_size']),
        hypervolume=f'{metrics.get("hypervolume", np.nan):.4f}',
      )
      bar.update(config.population)
  return state
