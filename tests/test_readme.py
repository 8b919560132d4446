"""The README's code is run, so that it stays true."""

import pathlib
import re
import types

import jax
import numpy as np
import pytest

from nemo_jax.search import nemo
from tests import placement

ROOT = pathlib.Path(__file__).parents[1]
TEXT = (ROOT / 'README.md').read_text()
BLOCKS = re.findall(r'```python\n(.*?)```', TEXT, re.S)


def run(block: str) -> types.ModuleType:
  module = types.ModuleType('readme')
  exec(compile(block, 'README.md', 'exec'), module.__dict__)
  return module


def block_with(word: str) -> str:
  (found,) = [block for block in BLOCKS if word in block]
  return found


@pytest.mark.slow
def test_the_library_use_runs(digits, monkeypatch):
  del digits  # only makes sure that the weights are there
  monkeypatch.chdir(ROOT)
  block = block_with('workloads.load')
  code = [line for line in block.splitlines() if line]
  assert len(code) <= 20
  used = run(block.replace('range(30)', 'range(2)'))
  assert 0 < float(used.metrics['hypervolume']) < 1


def test_the_model_of_your_own_runs(capsys):
  used = run(block_with('def apply'))
  printed = capsys.readouterr().out.strip()
  assert f'# {printed}' in block_with('def apply')
  assert used.logits.shape == (128, 10)


def test_the_species_of_your_own_searches():
  make = run(block_with('def make')).make
  problem = placement.placement_problem()
  team = (make(problem, 8),)
  state = nemo.init(jax.random.key(0), problem, team, 8)
  # Step by step each primitive would be compiled alone.
  step = jax.jit(nemo.step, static_argnames='species')
  state, metrics = step(jax.random.key(1), state, problem, team)
  assert np.isfinite(metrics['hypervolume'])


@pytest.mark.parametrize('path', re.findall(r'\]\(((?!http)[^)]+)\)', TEXT))
def test_links_lead_somewhere(path):
  assert (ROOT / path).exists()


def test_the_map_names_every_file():
  listed = set(re.findall(r'^  (\w+\.py|\w+/) ', TEXT, re.M))
  inside = {
    path.name + '/' * path.is_dir()
    for path in (ROOT / 'nemo_jax').iterdir()
    if not path.name.startswith('__')
  }
  assert inside == listed
