"""What holds of every Pareto primitive: transformations, memory, imports."""

import subprocess
import sys

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from nemo_jax import pareto
from nemo_jax.search.problem import Population
from tests.pareto.sets import SMOOTH, broken_sets, random_masks


def to_population(objectives):
  number = jnp.arange(len(objectives), dtype=jnp.int32)
  return Population(number[:, None], objectives, number)


def insert_halves(objectives, mask):
  objectives = jnp.where(mask[:, None], objectives, jnp.inf)
  old, new = jnp.split(objectives, 2)
  return pareto.archive_insert(to_population(old), to_population(new))


FUNCTIONS = {
  'nondominated_rank': pareto.nondominated_rank,
  'duplicated': pareto.duplicated,
  'crowding_distance': lambda x, mask: pareto.crowding_distance(x, None, mask),
  'hypervolume': lambda x, mask: pareto.hypervolume(x, jnp.ones(3), mask),
  'r2': lambda x, mask: pareto.r2(
    x, pareto.reference_directions(3, 4), jnp.zeros(3), mask
  ),
  'hyperplane_normalize': lambda x, mask: pareto.hyperplane_normalize(
    x, (jnp.sum(x, axis=-1) > 1).astype(jnp.int32), mask
  ),
  'associate': lambda x, mask: pareto.associate(
    jnp.where(mask[:, None], x, jnp.inf), pareto.reference_directions(3, 4)
  ),
  'nsga3_order': lambda x, mask: pareto.nsga3_order(
    jax.random.key(0), x, pareto.reference_directions(3, 4), mask
  ),
  'archive_insert': insert_halves,
}


@pytest.mark.parametrize('name', FUNCTIONS)
def test_jit_and_vmap_change_nothing(name):
  function = FUNCTIONS[name]
  # Clouds alone: elsewhere rounding decides which of two niches is nearer.
  sets = jnp.asarray(broken_sets(4, 9, 32, 3)[SMOOTH::3], jnp.float32)
  masks = jnp.asarray(random_masks(3, 3, 32))
  fast = jax.jit(jax.vmap(function))(sets, masks)
  for i in range(3):
    eager = function(sets[i], masks[i])
    alone = jax.tree.map(lambda x, i=i: x[i], fast)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
      alone,
      eager,
    )


def test_import_works_in_a_fresh_interpreter():
  program = 'from nemo_jax import pareto; print(pareto.__name__)'
  done = subprocess.run(
    [sys.executable, '-c', program], capture_output=True, text=True, check=True
  )
  assert done.stdout.strip() == 'nemo_jax.pareto'


# Memory.


def largest_array(function, *args):
  """Elements of the largest intermediate, loops and inner jits included."""

  def largest(jaxpr):
    sizes = [v.aval.size for e in jaxpr.eqns for v in e.outvars]
    inner = map(largest, jax.extend.core.subjaxprs(jaxpr))
    return max([*sizes, *inner], default=0)

  return largest(jax.make_jaxpr(function)(*args).jaxpr)


def test_largest_array_is_found_inside_of_loops_and_jits():
  def outer(x):
    def body(carry, _):
      return carry + jax.jit(lambda y: (y[:, None] * y).sum())(x), None

    return jax.lax.scan(body, 0.0, length=2)[0]

  assert largest_array(outer, jnp.ones(50)) == 2500


MEMORY_POINTS = 4096


@pytest.mark.parametrize(
  'function',
  [
    pareto.nondominated_rank,
    pareto.duplicated,
    pareto.crowding_distance,
    lambda x: pareto.hypervolume(x, jnp.ones(3)),
    lambda x: pareto.r2(x, pareto.reference_directions(3, 12), jnp.zeros(3)),
    lambda x: pareto.nsga3_order(
      jax.random.key(0), x, pareto.reference_directions(3, 12)
    ),
    lambda x: pareto.archive_insert(to_population(x), to_population(x)),
  ],
  ids=[
    'nondominated_rank',
    'duplicated',
    'crowding_distance',
    'hypervolume',
    'r2',
    'nsga3_order',
    'archive_insert',
  ],
)
def test_memory_does_not_grow_with_the_square_of_the_points(function):
  objectives = jnp.zeros((MEMORY_POINTS, 3))
  assert largest_array(function, objectives) <= MEMORY_POINTS * 600
