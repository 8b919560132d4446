"""Checks the annotations of the package while tests run: types and shapes.

python -m pytest -p tests.typechecked -m 'not slow' tests/pareto
"""

import jaxtyping

# The rooms of array code, whose contracts are shapes.
ROOMS = ['pareto', 'search', 'quantization', 'tasks']

jaxtyping.install_import_hook(
  [f'nemo_jax.{room}' for room in ROOMS], 'beartype.beartype'
)
