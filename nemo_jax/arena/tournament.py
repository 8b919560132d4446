"""Runs of all methods and seeds, whose results are stored in a file."""

import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jraph
import numpy as np
from jaxtyping import Int

from nemo_jax.arena import ablations, baselines, contest, statistics
from nemo_jax.core import files
from nemo_jax.core.types import InputError
from nemo_jax.search import allocation
from nemo_jax.search import species as species_lib
from nemo_jax.search.problem import Problem
from nemo_jax.tasks import mixed_precision

SHARES = (0.05, 0.1, 0.2, 0.25, 0.5, 1.0)  # of the budget, for tables
SCORES = ('search', 'unseen', 'unseen_top1')
# Largest capacity of an archive.
_ARCHIVE = 4096

# {method: {seed: {'curve', 'volumes', 'front'}}}
Results = dict[str, dict[str, dict[str, Any]]]


class Rules(NamedTuple):
  """Settings that are the same for all methods."""

  budget: int  # evaluations, including those that sensitivities count as
  population: int  # evaluations of a generation, and of a block
  sensitivity_cost: int  # evaluations that sensitivities count as

  @property
  def archive(self) -> int:
    """Capacity of the archive."""
    return min(self.budget, _ARCHIVE)


class Contestant(NamedTuple):
  """A method, with the problem that it is run on."""

  problem: Problem
  informed: bool  # whether it uses sensitivities
  run: contest.Method


def is_baseline(method: str) -> bool:
  """Whether a word names a baseline, rather than a team of species."""
  return not set(method) & {'+', '@'} and baselines.has(method)


def check_method(method: str) -> None:
  """Raises `InputError` for a word that names no method."""
  if is_baseline(method):
    return
  words, at, option = method.partition('@')
  if at:
    ablations.check(option)
  try:
    team = species_lib.team(words.split('+'))
  except InputError as error:
    known = ', '.join(baselines.names())
    raise InputError(f'{error}; or one of the baselines {known}') from error
  needing = [name for name, builder in team.items() if builder.needs_prior]
  if option == 'blind' and needing:
    raise InputError(
      f'{method!r}: {needing[0]!r} cannot be without sensitivities; name '
      'a team without, such as direct@blind'
    )


def check_population(method: str, population: int) -> None:
  """Raises `InputError` for a population too small for a method's species."""
  if not is_baseline(method):
    words, _, _ = method.partition('@')
    allocation.check_size(population, len(species_lib.team(words.split('+'))))


def contestant(
  method: str, problem: Problem, data_flow: jraph.GraphsTuple, rules: Rules
) -> Contestant:
  """The method that a word names, on its problem.

  Args:
    method: a baseline; or a team, which is `nemo`, `paper` or species joined by
      `+`, with one of `ablations.WORDS` behind `@` for an ablation.
    problem: that is searched, with a prior.
    data_flow: graph of the data flow, for the ablation of that name.
    rules: of the tournament.

  Raises:
    InputError: the word names no method.
  """
  if is_baseline(method):
    found = baselines.find(method)
    run = contest.baseline(problem, found.search)
    return Contestant(problem, found.needs_prior, run)
  words, at, option = method.partition('@')
  if species_lib.is_blind(words.split('+')):
    problem = mixed_precision.blind(problem)
  settings = {}
  if at:
    problem, settings = ablations.ablate(option, problem, data_flow)
  run = contest.team(
    problem,
    list(species_lib.team(words.split('+')).values()),
    rules.population,
    archive_size=rules.archive,
    **settings,
  )
  return Contestant(problem, problem.prior is not None, run)


def _unseen_volumes(
  unseen: Problem, rows: Int[np.ndarray, 'n N'], objectives: int
) -> tuple[float, float]:
  """Hypervolumes of a front on unseen images: as searched, and by top-1 error.

  Args:
    unseen: problem on these images, with the objectives of the search and
      top-1 error.
    rows: choices of the front.
    objectives: number of objectives of the search.
  """
  values = contest.objectives(unseen, rows)
  columns = list(range(objectives))
  top1 = [unseen.objective_names.index('top1_error'), *columns[1:]]
  volume = lambda own: statistics.hypervolume(
    values[:, own],
    np.asarray(unseen.ideal)[own],
    np.asarray(unseen.reference)[own],
  )
  return volume(columns), volume(top1)


def run_cell(
  one: Contestant,
  unseen: Problem,
  seed: int,
  rules: Rules,
  progress: Callable[[int], None],
) -> dict[str, Any]:
  """Curve, hypervolumes and front of one method with one seed.

  Args:
    one: the method.
    unseen: problem on images that are not used in the search, with top-1 error
      among its objectives.
    seed: of the method.
    rules: of the tournament.
    progress: called with the number of new evaluations.
  """
  spent = rules.sensitivity_cost * one.informed
  ledger = contest.Ledger(
    one.problem, spent, rules.population, progress, rules.archive
  )
  blocks = (rules.budget - spent) // rules.population
  one.run(jax.random.key(seed), blocks * rules.population, ledger)
  volumes = {}
  for share in SHARES:
    mark = int(share * rules.budget)
    found = [volume for count, volume in ledger.curve if count <= mark]
    volumes[str(mark)] = {'search': max(found, default=0.0)}
  rows, values = ledger.front()
  last = _unseen_volumes(unseen, rows, values.shape[1])
  volumes[str(rules.budget)] |= dict(zip(SCORES[1:], last, strict=True))
  return {'curve': ledger.curve, 'volumes': volumes, 'front': values.tolist()}


def read_results(path: pathlib.Path) -> Results:
  """The stored cells; none if there is no file.

  Raises:
    InputError: the file is damaged.
  """
  if not path.exists():
    return {}
  try:
    results = files.read_json(path)
  except files.DamagedError as error:
    raise InputError(f'{error}; delete it') from error
  if not files.is_sealed(results):
    raise InputError(f'{path} is damaged: its digest does not match; delete it')
  return {m: x for m, x in results.items() if m not in ('run', 'sha256')}


def run_all(
  path: str | os.PathLike,
  contestants: Mapping[str, Contestant],
  seeds: Sequence[str],
  unseen: Problem,
  rules: Rules,
  run_digest: str,
  bar: Any,
) -> Results:
  """The cells of all methods and seeds; stored ones are not run again.

  Args:
    path: of the file in which cells are stored.
    contestants: methods by name.
    seeds: of each method.
    unseen: see `run_cell`.
    rules: of the tournament.
    run_digest: of the run's flags and files.
    bar: a tqdm bar over evaluations.

  Raises:
    InputError: the file is damaged, or cannot be written.
  """
  path = files.local(path)
  results = read_results(path)
  for method, one in contestants.items():
    bar.set_postfix_str(method)
    for seed in seeds:
      if seed in results.get(method, {}):
        bar.update(rules.budget)
        continue
      before = bar.n
      cell = run_cell(one, unseen, int(seed), rules, bar.update)
      # Evaluations that a method did not use count as done.
      bar.update(rules.budget - (bar.n - before))
      results.setdefault(method, {})[seed] = cell
      files.write_json(path, results | {'run': run_digest})
    # Linux allows a process 65,530 memory maps. The compiled program of a large
    # network takes thousands, and one too many ends the process.
    jax.clear_caches()
  return {m: {s: results[m][s] for s in seeds} for m in contestants}
