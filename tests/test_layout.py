"""Imports between the rooms go one way, and TensorFlow stays outside."""

import ast
import graphlib
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / 'nemo_jax'
FILES = sorted(PACKAGE.rglob('*.py'))
# What must never be imported from a room, however indirectly.
FORBIDDEN = {
  'core': {'pareto', 'search', 'quantization', 'tasks', 'runs', 'workloads'},
  'pareto': {'search', 'quantization', 'tasks', 'runs', 'workloads'},
  'search': {'quantization', 'tasks', 'runs', 'workloads', 'arena'},
  'quantization': {'search', 'tasks', 'runs', 'workloads', 'arena'},
  'data': {'search', 'quantization', 'tasks', 'workloads'},
  'models': {'search', 'quantization', 'tasks', 'workloads'},
  'tasks': {'workloads', 'arena', 'runs'},
}


# Functions that are longer than others may be, and why they read better so.
LONG = {
  # Loops over one set of arrays: as functions each would take a dozen.
  'nemo_jax.pareto.sorting.nondominated_rank',
  'nemo_jax.quantization.backend.kernels.convolve',
  # A species is three functions around its problem and its options.
  'nemo_jax.search.species.boltzmann.make',
  'nemo_jax.search.species.direct.make',
  'nemo_jax.search.species.lagrangian.make',
}
MOST_LINES, MOST_IN_FILE = 60, 350


def module_of(path: pathlib.Path) -> str:
  parts = path.relative_to(ROOT).with_suffix('').parts
  return '.'.join(parts).removesuffix('.__init__')


MODULES = {module_of(path) for path in FILES}


def for_types(node: ast.stmt) -> bool:
  return isinstance(node, ast.If) and 'TYPE_CHECKING' in ast.unparse(node.test)


def imported(path: pathlib.Path) -> set[str]:
  """All that a file imports, as modules where they are of this package."""
  found = set()
  tree = ast.parse(path.read_text())
  # What is imported for a type checker alone is not there when code runs.
  tree.body = [node for node in tree.body if not for_types(node)]
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{path}: relative import'
      names = {f'{node.module}.{alias.name}' for alias in node.names}
      found |= {name if name in MODULES else node.module for name in names}
  return found


def room(module: str) -> str:
  return module.split('.')[1]


def rooms() -> dict[str, set[str]]:
  """The rooms that each room imports from."""
  graph = {}
  for path in FILES:
    if path.parent == PACKAGE:  # the roof
      continue
    here = module_of(path)
    own = graph.setdefault(room(here), set())
    for name in imported(path):
      if name.startswith('nemo_jax.') and room(name) != room(here):
        own.add(room(name))
  return graph


def below(graph: dict[str, set[str]], name: str) -> set[str]:
  """The rooms that a room needs, directly or through others."""
  found, rest = set(), list(graph[name])
  while rest:
    if (one := rest.pop()) not in found:
      found.add(one)
      rest += graph[one]
  return found


def test_no_room_imports_itself_through_others():
  order = list(graphlib.TopologicalSorter(rooms()).static_order())
  assert order[0] == 'core'


def test_no_file_imports_itself_through_others():
  graph = {module_of(path): imported(path) & MODULES for path in FILES}
  # Facades name what is below them, and are imported by nobody for it.
  for path in FILES:
    if path.name == '__init__.py':
      del graph[module_of(path)]
  graph = {name: used & graph.keys() for name, used in graph.items()}
  graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize('name', FORBIDDEN)
def test_rooms_keep_their_distance(name):
  assert not below(rooms(), name) & FORBIDDEN[name]


def test_no_room_imports_from_the_roof():
  roof = {module_of(path) for path in FILES if path.parent == PACKAGE}
  for path in FILES:
    if path.parent != PACKAGE:
      # The package itself says which version it is.
      assert not imported(path) & roof - {'nemo_jax'}, path


def test_nothing_in_the_package_imports_an_experiment():
  for path in FILES:
    assert not any(x.startswith('experiments') for x in imported(path)), path


@pytest.mark.parametrize('path', FILES, ids=module_of)
def test_the_package_reads_no_flags_and_needs_no_large_framework(path):
  names = imported(path)
  assert not any(name.startswith('absl') for name in names)
  # Where a user asks for what only they can do, and there alone.
  allowed = {
    'nemo_jax.data.prepared': 'tensorflow',
    'nemo_jax.models.weights.checkpoints': 'torch',
  }
  others = {'tensorflow', 'torch'} - {allowed.get(module_of(path))}
  assert not {name.split('.')[0] for name in names} & others


def test_importing_the_package_imports_no_large_framework():
  code = (
    'import sys, nemo_jax.workloads, nemo_jax.models.weights, nemo_jax.data; '
    'sys.exit(bool({"tensorflow", "torch"} & set(sys.modules)))'
  )
  assert subprocess.run([sys.executable, '-c', code], cwd=ROOT).returncode == 0


def test_importing_an_experiment_leaves_jax_free_to_join_processes():
  code = (
    'import sys, experiments.search; from jax._src import xla_bridge; '
    'sys.exit(xla_bridge.backends_are_initialized())'
  )
  assert subprocess.run([sys.executable, '-c', code], cwd=ROOT).returncode == 0


def test_the_search_names_no_species():
  for path in (PACKAGE / 'search').glob('*.py'):
    names = imported(path)
    assert not any(x.startswith('nemo_jax.search.species') for x in names), path


def lengths(path: pathlib.Path) -> dict[str, int]:
  """Lines of the functions of a file, without their docstrings."""
  found = {}
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.FunctionDef):
      lines = node.end_lineno - node.lineno + 1
      if ast.get_docstring(node) is not None:
        lines -= node.body[0].end_lineno - node.body[0].lineno + 1
      name = f'{module_of(path)}.{node.name}'
      found[name] = max(lines, found.get(name, 0))
  return found


def test_functions_and_files_are_short():
  sizes = {name: n for path in FILES for name, n in lengths(path).items()}
  long = {name for name, lines in sizes.items() if lines > MOST_LINES}
  assert long == LONG
  for path in FILES:
    assert len(path.read_text().splitlines()) <= MOST_IN_FILE, path
