"""Programs that are compiled in little time, and run in more."""

import functools

import jax

quickly = functools.partial(
  jax.jit, compiler_options={'xla_backend_optimization_level': 0}
)
