"""Methods by name, run with every seed; what is done is kept in a file."""

import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jraph
import numpy as np

from nemo_jax.arena import ablations, baselines, contest, statistics
from nemo_jax.core import files
from nemo_jax.core.types import InputError
from nemo_jax.search import allocation
from nemo_jax.search import species as species_lib
from nemo_jax.search.problem import Problem
from nemo_jax.tasks import mixed_precision

SHARES = (0.05, 0.1, 0.2, 0.25, 0.5, 1.0)  # of the budget, that tables show
SCORES = ('search', 'unseen', 'unseen_top1')
# Slots of an archive, at most.
_ARCHIVE = 4096

# {method: {seed: {'curve', 'volumes', 'front'}}}
Results = dict[str, dict[str, dict[str, Any]]]


class Rules(NamedTuple):
  """What is the same for every method."""

  budget: int  # evaluations, those for sensitivities included
  population: int  # places of a team; all report after so many evaluations
  sensitivity_cost: int  # evaluations that sensitivities count as

  @property
  def archive(self) -> int:
    """Slots of the archive."""
    return min(self.budget, _ARCHIVE)


class Contestant(NamedTuple):
  """A method on the problem that it sees."""

  problem: Problem
  informed: bool  # whether it was given sensitivities
  run: contest.Method


def is_baseline(method: str) -> bool:
  """Whether a word names a baseline, and no team of species."""
  return not set(method) & {'+', '@'} and baselines.has(method)


def check_method(method: str) -> None:
  """Raises `InputError` for a word that is no method."""
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
  """Raises `InputError` for fewer places than a method needs."""
  if not is_baseline(method):
    words, _, _ = method.partition('@')
    allocation.check_size(population, len(species_lib.team(words.split('+'))))


def contestant(
  method: str, problem: Problem, data_flow: jraph.GraphsTuple, rules: Rules
) -> Contestant:
  """A method by its word.

  Args:
    method: a baseline; or species joined by `+`, `nemo` or `paper`, and behind
      `@` one of `ablations.WORDS`.
    problem: what is searched, with a prior.
    data_flow: the graph of the data flow, for that ablation.
    rules: of the tournament.

  Raises:
    InputError: the word is no method.
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
  unseen: Problem, rows: np.ndarray, objectives: int
) -> tuple[float, float]:
  """Hypervolumes of a front on unseen images: as searched, for top-1 error."""
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
  """What one method with one seed has found: curve, hypervolumes and front.

  Args:
    one: the method.
    unseen: the problem on images that no search has seen, with top-1 error.
    seed: of the method.
    rules: of the tournament.
    progress: is told of every evaluation.
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
  """The cells that are done.

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
  """The cells of all methods and seeds; those that are done are read.

  Args:
    path: of the file with what is done.
    contestants: by name.
    seeds: of each.
    unseen: see `run_cell`.
    rules: of the tournament.
    run_digest: of what the run was started with.
    bar: a tqdm bar over evaluations.
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
      # What was not used counts as done.
      bar.update(rules.budget - (bar.n - before))
      results.setdefault(method, {})[seed] = cell
      files.write_json(path, results | {'run': run_digest})
    # Linux lets a process map 65,530 pieces of memory; a program of a large
    # network takes thousands, and a failed map ends the process.
    jax.clear_caches()
  return {m: {s: results[m][s] for s in seeds} for m in contestants}
