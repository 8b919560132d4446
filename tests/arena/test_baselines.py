"""Every baseline keeps to its budget and finds what it is known for."""

import jax
import numpy as np
import pytest
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.core.problem import Problem as PymooProblem
from pymoo.operators.repair.rounding import RoundingRepair
from pymoo.operators.sampling.rnd import IntegerRandomSampling
from pymoo.optimize import minimize

from nemo_jax.arena import baselines, contest, statistics
from nemo_jax.arena.baselines import greedy
from nemo_jax.core.types import InputError
from nemo_jax.search import prior as prior_lib
from tests.additive import additive_problem

PROBLEM = additive_problem()
NODES, CHOICES = PROBLEM.allowed.shape


def barred():
  """The problem with a third of the choices not allowed."""
  rng = np.random.default_rng(0)
  allowed = rng.random(PROBLEM.allowed.shape) < 0.7
  allowed[np.arange(NODES), rng.integers(0, CHOICES, NODES)] = True
  return PROBLEM.replace(allowed=allowed)


def run(name, evaluations=60, seed=0, problem=PROBLEM):
  """What a baseline asked, and the ledger."""
  ledger, asked = contest.Ledger(problem), []

  def score(choices):
    asked.append(np.asarray(choices))
    return ledger.score(choices)

  search = baselines.find(name).search
  search(jax.random.key(seed), problem, evaluations, score)
  return np.concatenate(asked), ledger


@pytest.mark.parametrize('name', baselines.names())
def test_baselines_stay_within_what_is_allowed_and_within_their_budget(name):
  problem = barred()
  for evaluations in (1, 3, 25):
    asked, ledger = run(name, evaluations, problem=problem)
    assert 1 <= len(asked) <= evaluations
    assert ledger.spent == len(asked)
    assert problem.allowed[np.arange(NODES), asked].all()


@pytest.mark.parametrize('name', baselines.names())
def test_the_key_decides(name):
  first, again, other = (run(name, 12, seed=s)[0] for s in (0, 0, 1))
  np.testing.assert_array_equal(first, again)
  if name != 'uniform':
    assert first.shape != other.shape or (first != other).any()


@pytest.mark.parametrize('name', baselines.names())
def test_a_baseline_says_whether_it_needs_the_prior(name):
  needing = {'mckp', 'greedy', 'integer_program'}
  assert (name in needing) == baselines.find(name).needs_prior


@pytest.mark.slow
def test_where_the_estimate_is_the_truth_knowledge_is_ahead():
  volume = lambda *args: run(*args)[1].curve[-1][1]
  blind = {
    name: np.mean([volume(name, 480, seed) for seed in range(6)])
    for name in ('nsga2', 'evopress', 'random_search')
  }
  # With a quarter of the evaluations.
  for name in ('mckp', 'integer_program'):
    assert volume(name, 120) > blind['nsga2']
  assert blind['nsga2'] > blind['random_search']
  assert blind['evopress'] > blind['random_search']
  assert volume('greedy', 120) > volume('uniform', 120)


def test_nsga2_is_no_straw_man():
  """As good as pymoo's, on the same problem with the same budget."""

  class Additive(PymooProblem):
    def __init__(self):
      super().__init__(n_var=NODES, n_obj=3, xl=0, xu=CHOICES - 1, vtype=int)

    def _evaluate(self, x, out):
      out['F'] = contest.objectives(PROBLEM, x)

  ours, theirs = [], []
  for seed in range(4):
    ours.append(run('nsga2', 600, seed)[1].curve[-1][1])
    found = minimize(
      Additive(),
      NSGA2(50, sampling=IntegerRandomSampling(), repair=RoundingRepair()),
      ('n_eval', 600),
      seed=seed,
    )
    rows = np.asarray(found.F, np.float32)
    volume = statistics.hypervolume(rows, PROBLEM.ideal, PROBLEM.reference)
    theirs.append(volume)
  assert np.mean(ours) > 0.97 * np.mean(theirs)


def test_greedy_takes_the_least_sensitive_step_first():
  rows = greedy.stages(PROBLEM)
  loss = np.asarray(PROBLEM.prior.loss)
  assert (rows[0] == CHOICES - 1).all()
  taken = []
  for before, after in zip(rows[:-1], rows[1:], strict=True):
    (node,) = np.flatnonzero(before != after)
    assert after[node] < before[node]
    taken.append(loss[node, after[node]])
  assert taken == sorted(taken)
  assert (rows[-1] == 0).all()


@pytest.mark.slow
def test_integer_programs_are_not_beaten_by_prices():
  """No configuration of the estimate's own front dominates what they find."""
  asked, _ = run('integer_program', 12)
  front = prior_lib.front(jax.random.key(5), PROBLEM, 2000)
  totals = jax.vmap(prior_lib.totals, in_axes=(None, 0))
  own, others = (
    np.asarray(totals(PROBLEM.prior, rows)) for rows in (asked, front)
  )
  for row in own:
    better = (others <= row * (1 - 1e-3)).all(axis=1)
    assert not better.any()


def test_an_unknown_baseline_lists_the_known():
  with pytest.raises(InputError, match="'ants'; the choices are evopress, gr"):
    baselines.find('ants')
  assert not baselines.has('ants')


RIVAL = """
from nemo_jax.arena.baseline import Baseline
from nemo_jax.search import variation

def search(key, problem, evaluations, score):
  rows = [[k] * len(problem.allowed) for k in range(evaluations)]
  score(variation.nearest_allowed(rows, problem.allowed))

BASELINE = Baseline(search, needs_prior=True)
"""


def test_a_file_of_the_users_own_is_a_baseline(tmp_path):
  path = tmp_path / 'rival.py'
  path.write_text(RIVAL)
  assert baselines.has(str(path))
  assert baselines.find(str(path)).needs_prior
  asked, ledger = run(str(path), 2)
  assert ledger.spent == 2
  np.testing.assert_array_equal(asked, [[0] * NODES, [1] * NODES])


@pytest.mark.parametrize(
  ('text', 'words'),
  [
    ('BUILDER = 1', 'has no BASELINE; a file of this kind defines BASELINE'),
    ('1 / 0', 'cannot be imported: ZeroDivisionError: division by zero'),
    ('def', 'cannot be imported: SyntaxError: invalid syntax'),
    (None, 'cannot be imported: FileNotFoundError'),
  ],
)
def test_a_file_that_is_no_baseline_is_one_line(tmp_path, text, words):
  path = tmp_path / 'rival.py'
  if text is not None:
    path.write_text(text)
  with pytest.raises(InputError, match=words) as caught:
    baselines.find(str(path))
  assert str(path) in str(caught.value)
  assert '\n' not in str(caught.value)
