"""The code of README, pages and notebook runs, and links lead somewhere."""

import json
import os
import pathlib
import re
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from nemo_jax import nemo
from nemo_jax.arena import contest
from tests import placement

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
BLOCKS = [
  pytest.param(block, id=f'{page.name}-{number}')
  for page in PAGES
  for number, block in enumerate(
    re.findall(r'```python[^\n]*\n(.*?)```', page.read_text(), re.S)
  )
]
# Of these a search is run, or a network is trained and reconstructed.
LONG = ('nemo_jax.search(', 'search_run.run(', 'workloads.load(', 'nemo.make(')


def is_long(block: str) -> bool:
  return any(word in block for word in LONG)


def run(block: str) -> types.ModuleType:
  module = types.ModuleType('page')
  exec(compile(block, 'page', 'exec'), module.__dict__)
  return module


def block_with(word: str) -> str:
  (found,) = [block.values[0] for block in BLOCKS if word in block.values[0]]
  return found


@pytest.mark.parametrize(
  'block', [block for block in BLOCKS if not is_long(block.values[0])]
)
def test_short_code_runs(block):
  run(block)


@pytest.mark.slow
@pytest.mark.parametrize(
  'block', [block for block in BLOCKS if is_long(block.values[0])]
)
def test_code_that_searches_runs(digits, tmp_path, monkeypatch, block):
  del digits  # only makes sure that the weights are there
  (tmp_path / 'runs').mkdir()
  (tmp_path / 'runs' / 'cache').symlink_to(ROOT / 'runs' / 'cache')
  monkeypatch.chdir(tmp_path)
  run(block)


@pytest.mark.slow
def test_the_notebook_runs(digits, tmp_path):
  del digits
  content = json.loads((ROOT / 'docs' / 'notebook.ipynb').read_text())
  cells = [c for c in content['cells'] if c['cell_type'] == 'code']
  assert len(cells) > 3
  assert not any(cell['outputs'] for cell in cells)
  code = '\n\n'.join(''.join(cell['source']) for cell in cells)
  (tmp_path / 'runs').mkdir()
  (tmp_path / 'runs' / 'cache').symlink_to(ROOT / 'runs' / 'cache')
  (tmp_path / 'notebook.py').write_text(code)
  ended = subprocess.run(
    [sys.executable, 'notebook.py'],
    cwd=tmp_path,
    env={**os.environ, 'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
  )
  assert ended.returncode == 0, ended.stderr[-2000:]


def test_what_a_page_says_is_printed_is_printed(capsys):
  block = block_with("# ['hidden:input'")
  run(block)
  assert f'# {capsys.readouterr().out.strip()}' in block


def test_the_species_of_the_pages_searches():
  builder = run(block_with('class State(NamedTuple)')).BUILDER
  search = nemo.make(placement.placement_problem(), [builder], 8)
  # Step by step each primitive would be compiled alone.
  state, metrics = jax.jit(search.step)(
    jax.random.key(1), search.init(jax.random.key(0))
  )
  assert np.isfinite(metrics['hypervolume'])
  assert int(state.generation) == 1


def test_the_baseline_of_the_pages_keeps_to_its_budget():
  problem = placement.placement_problem()
  method = contest.baseline(
    problem, run(block_with('BASELINE =')).BASELINE.search
  )
  ledger = contest.Ledger(problem)
  method(jax.random.key(0), 60, ledger)
  assert ledger.spent <= 60
  assert ledger.curve[-1][1] > 0


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
  for path in re.findall(r'\]\(((?!http)[^)#]+)[^)]*\)', page.read_text()):
    assert (page.parent / path).exists(), path


def test_the_readme_is_short():
  assert len((ROOT / 'README.md').read_text().splitlines()) < 160
