"""What species are told, made up, of a small problem."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from nemo_jax import pareto
from nemo_jax.search import surrogate
from nemo_jax.search.problem import Feedback, Population
from tests.placement import placement_problem

# Screening is tested elsewhere, and takes long to compile.
PROBLEM = placement_problem(7).replace(known_objectives=None)
NODES, CHOICES = PROBLEM.allowed.shape


@functools.cache
def nothing_learned() -> surrogate.Learned:
  """What the surrogate says before it has seen anything."""
  empty = pareto.empty_population(surrogate.MEMORY, NODES, 3)
  return jax.jit(surrogate.learn)(PROBLEM, empty)


def some_feedback(places, own=None, source=None, asked=None) -> Feedback:
  """Of a generation in which every survivor was a parent, unless told."""
  everyone = np.ones(places, bool)
  rank = jnp.arange(places, dtype=jnp.float32)
  return Feedback(
    population=Population(
      choices=jnp.ones((places, NODES), jnp.int32),
      objectives=jnp.ones((places, 3), jnp.float32),
      species=jnp.zeros(places, jnp.int32),
    ),
    rank=rank,
    own=jnp.asarray(everyone if own is None else own),
    source=jnp.asarray(
      np.arange(places) if source is None else source, jnp.int32
    ),
    fitness=jnp.arange(asked or places, dtype=jnp.float32),
    learned=nothing_learned(),
  )
