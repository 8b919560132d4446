"""Methods by name, run with every seed; what is done is kept."""

import json

import numpy as np
import pytest
import tqdm

from nemo_jax.arena import baselines, contest, tournament
from nemo_jax.core import files
from nemo_jax.core.types import InputError
from tests.additive import additive_problem

# Of three objectives, of which the first stands for top-1 error too.
PROBLEM = additive_problem().replace(
  objective_names=('divergence', 'size', 'work')
)
UNSEEN = PROBLEM.replace(
  objective_names=('divergence', 'size', 'work', 'top1_error'),
  ideal=np.zeros(4, np.float32),
  reference=np.append(PROBLEM.reference, PROBLEM.reference[:1]),
  evaluate=lambda data, row: PROBLEM.evaluate(data, row)[
    np.array([0, 1, 2, 0])
  ],
)
RULES = tournament.Rules(budget=40, population=8, sensitivity_cost=9)


def contestant(method):
  return tournament.contestant(method, PROBLEM, PROBLEM.graph, RULES)


@pytest.mark.parametrize(
  'method',
  ['nemo', 'paper', 'direct', 'gcn:SNES+direct', 'direct@blind']
  + ['nemo@unscreened', *baselines.names()],
)
def test_what_is_a_method_is_not_refused(method):
  tournament.check_method(method)
  tournament.check_population(method, 20)


@pytest.mark.parametrize(
  ('method', 'words'),
  [
    ('ants', "unknown species 'ants'; .*; or one of the baselines evopress"),
    ('nemo+ants', "unknown species 'ants'"),
    ('uniform+direct', "unknown species 'uniform'"),
    ('direct@fast', "unknown ablation 'fast'; the choices are unscreened"),
    ('nemo@', "unknown ablation ''"),
    ('nemo@blind', "'lagrangian' cannot be without sensitivities"),
    ('none.py', "method 'none.py' cannot be imported: FileNotFoundError"),
  ],
)
def test_what_is_no_method_is_refused(method, words):
  with pytest.raises(InputError, match=words) as caught:
    tournament.check_method(method)
  assert '\n' not in str(caught.value)


def test_a_team_needs_two_places_a_species_and_a_baseline_none():
  tournament.check_population('uniform', 1)
  tournament.check_population('direct@blind', 2)
  with pytest.raises(InputError, match='7 is too small for 4 species'):
    tournament.check_population('nemo@equal', 7)


def test_a_contestant_is_told_whether_knowledge_was_given():
  assert contestant('mckp').informed
  assert not contestant('evopress').informed
  assert contestant('direct').informed
  for method in ('direct@blind', 'paper'):
    one = contestant(method)
    assert not one.informed
    assert one.problem.prior is None


@pytest.mark.parametrize(('method', 'spent'), [('uniform', 0), ('mckp', 9)])
def test_a_cell_counts_what_knowledge_took(method, spent):
  told = []
  cell = tournament.run_cell(contestant(method), UNSEEN, 0, RULES, told.append)
  assert cell['curve'][0] == (spent, 0.0)
  assert sum(told) <= (40 - spent) // 8 * 8
  marks = [2, 4, 8, 10, 20, 40]
  assert list(map(int, cell['volumes'])) == marks
  volumes = [cell['volumes'][str(mark)]['search'] for mark in marks]
  assert volumes == sorted(volumes)
  assert volumes[0] == 0
  last = cell['volumes']['40']
  assert last.keys() == {'search', 'unseen', 'unseen_top1'}
  # The unseen images are those of the search here.
  assert last['unseen'] == pytest.approx(last['search'], rel=1e-5)
  assert last['unseen_top1'] == pytest.approx(last['search'], rel=1e-5)
  json.dumps(cell)


def run_all(path, methods, seeds):
  with tqdm.tqdm(disable=True) as bar:
    return tournament.run_all(
      path,
      {method: contestant(method) for method in methods},
      seeds,
      UNSEEN,
      RULES,
      'digest',
      bar,
    )


def test_what_is_done_is_kept_and_more_may_be_added(tmp_path, monkeypatch):
  path = tmp_path / 'compare.json'
  first = run_all(path, ['uniform'], ['0'])
  assert first.keys() == {'uniform'}
  found = run_all(path, ['mckp', 'uniform'], ['0', '1'])
  assert list(found) == ['mckp', 'uniform']
  assert set(found['mckp']) == {'0', '1'}
  plain = json.loads(json.dumps(first))
  assert found['uniform']['0'] == plain['uniform']['0']
  assert json.loads(path.read_text())['run'] == 'digest'
  monkeypatch.setattr(tournament, 'run_cell', pytest.fail)
  assert run_all(path, ['uniform', 'mckp'], ['1']) == {
    method: {'1': cells['1']}
    for method, cells in tournament.read_results(path).items()
  }


@pytest.mark.parametrize('text', ['{"nemo": ', '7', '{"nemo": {}}', 'sealed'])
def test_damaged_results_are_named(tmp_path, text):
  path = tmp_path / 'compare.json'
  assert tournament.read_results(path) == {}
  results = {'nemo': {'0': {'front': [[0.5, 0.25]]}}}
  files.write_json(path, results | {'run': 'digest'})
  assert tournament.read_results(path) == results
  path.write_text(
    path.read_text().replace('0.25', '0.26') if text == 'sealed' else text
  )
  with pytest.raises(InputError, match='compare.json is damaged.*delete it'):
    tournament.read_results(path)


def test_an_archive_has_a_slot_for_every_evaluation_within_reason():
  assert RULES.archive == 40
  assert RULES._replace(budget=10**6).archive == 4096
  assert contest.Ledger(PROBLEM, capacity=40).archive.choices.shape[0] == 40
