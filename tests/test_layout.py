"""The rooms of the house: imports go one way, and TensorFlow stays outside."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
# From the ground to the roof: a module imports only from floors below its own.
FLOORS = [
  ['base'],
  ['checks', 'devices', 'files'],
  ['checkpoints', 'contract', 'evaluate', 'metrics'],
  [
    'blocks',
    'estimate',
    'memory',
    'networks',
    'pareto',
    'quantization',
    'variation',
  ],
  ['data', 'models', 'ssne', 'surrogate', 'weights'],
  ['images'],
  ['neuroevolution'],
  ['species', 'nemo', 'workloads'],
  ['mixed_precision', 'baselines', 'arena'],
  ['ablations', 'front', 'report'],
  ['runs'],
]
FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names}
FILES = sorted((ROOT / 'nemo_jax').rglob('*.py'))


def imported(path: pathlib.Path) -> set[str]:
  modules = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      modules |= {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{path}: relative import'
      modules |= {f'{node.module}.{alias.name}' for alias in node.names}
  return modules


def room(path: pathlib.Path) -> str:
  return path.relative_to(ROOT / 'nemo_jax').with_suffix('').parts[0]


def test_every_module_has_a_floor():
  rooms = {room(path) for path in FILES} - {'__init__'}
  assert rooms == set(FLOOR)


@pytest.mark.parametrize('path', FILES, ids=lambda p: str(p.name))
def test_imports_go_one_way(path):
  if path == ROOT / 'nemo_jax' / '__init__.py':
    return
  here = FLOOR[room(path)]
  for module in imported(path):
    parts = module.split('.')
    if parts[0] != 'nemo_jax' or len(parts) < 2:
      continue
    there = FLOOR.get(parts[1])
    # Names such as nemo_jax.__version__ and neighbours in a folder are free.
    if there is None or parts[1] == room(path):
      continue
    assert there < here, f'{path.name} imports {module}'


@pytest.mark.parametrize('path', FILES, ids=lambda p: str(p.name))
def test_the_package_reads_no_flags_and_needs_no_large_framework(path):
  names = imported(path)
  assert not any(name.startswith('absl') for name in names)
  # Where a user asks for what only they can do, and there alone.
  allowed = {'prepared.py': 'tensorflow', 'checkpoints.py': 'torch'}
  others = {'tensorflow', 'torch'} - {allowed.get(path.name)}
  assert not {name.split('.')[0] for name in names} & others


def test_importing_the_package_imports_no_large_framework():
  code = (
    'import sys, nemo_jax.workloads, nemo_jax.weights, nemo_jax.data; '
    'sys.exit(bool({"tensorflow", "torch"} & set(sys.modules)))'
  )
  assert subprocess.run([sys.executable, '-c', code], cwd=ROOT).returncode == 0


def test_importing_an_experiment_leaves_jax_free_to_join_processes():
  code = (
    'import sys, experiments.search; from jax._src import xla_bridge; '
    'sys.exit(xla_bridge.backends_are_initialized())'
  )
  assert subprocess.run([sys.executable, '-c', code], cwd=ROOT).returncode == 0


def test_the_search_knows_no_species_workload_or_quantizer():
  names = imported(ROOT / 'nemo_jax' / 'nemo.py')
  for word in ('species.', 'workloads', 'quantization'):
    assert not any(f'nemo_jax.{word}' in name for name in names)
