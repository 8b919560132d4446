"""The README's code is run, so that it stays true."""

import pathlib
import re
import types

import jax
import numpy as np
import pytest

from nemo_jax import nemo
from tests import placement

ROOT = pathlib.Path(__file__).parents[1]
TEXT = (ROOT / 'README.md').read_text()
BLOCKS = re.findall(r'```python\n(.*?)```', TEXT, re.S)
# Of those that search a trained network.
LONG = [block for block in BLOCKS if 'workloads.load' in block]


def run(block: str) -> types.ModuleType:
  module = types.ModuleType('readme')
  exec(compile(block, 'README.md', 'exec'), module.__dict__)
  return module


def block_with(word: str) -> str:
  (found,) = [block for block in BLOCKS if word in block]
  return found


def shortened(block: str) -> str:
  """The code with fewer evaluations and generations."""
  block = re.sub(r'evaluations=[0-9_]+', 'evaluations=8', block)
  return re.sub(r'range\([0-9]+\)', 'range(2)', block)


@pytest.mark.slow
@pytest.mark.parametrize('block', LONG)
def test_searches_run(digits, monkeypatch, block):
  del digits  # only makes sure that the weights are there
  monkeypatch.chdir(ROOT)
  code = [line for line in block.splitlines() if line]
  assert len(code) <= 20
  used = run(shortened(block))
  if hasattr(used, 'metrics'):
    assert 0 < float(used.metrics['hypervolume']) < 1
  if hasattr(used, 'front'):
    assert used.front.points


def test_the_model_of_your_own_runs(capsys):
  used = run(block_with('def apply'))
  printed = capsys.readouterr().out.strip()
  assert f'# {printed}' in block_with('def apply')
  assert used.logits.shape == (128, 10)


def test_the_species_of_your_own_searches():
  builder = run(block_with('def make')).BUILDER
  search = nemo.make(placement.placement_problem(), [builder], 8)
  # Step by step each primitive would be compiled alone.
  state, metrics = jax.jit(search.step)(
    jax.random.key(1), search.init(jax.random.key(0))
  )
  assert np.isfinite(metrics['hypervolume'])
  assert int(state.generation) == 1


@pytest.mark.parametrize('path', re.findall(r'\]\(((?!http)[^)]+)\)', TEXT))
def test_links_lead_somewhere(path):
  assert (ROOT / path).exists()


def test_the_map_names_every_file():
  listed = set(re.findall(r'^  (\w+\.py|\w+/) ', TEXT, re.M))
  inside = {
    path.name + '/' * path.is_dir()
    for path in (ROOT / 'nemo_jax').iterdir()
    if path.suffix in ('.py', '') and not path.name.startswith('__')
  }
  assert inside == listed
