"""Sub-structure neuroevolution (SSNE) as an evosax algorithm.

The evolutionary operators of NEMO's graph neural networks (arXiv 2106.07611),
after Khadka and Tumer 2018 and EGRL (arXiv 2007.07298): crossover and mutation
apply to each tensor of a network separately.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from evosax.algorithms.population_based import base
from evosax.core.fitness_shaping import identity_fitness_shaping_fn
from flax import struct
from jaxtyping import Bool, Float, Shaped

from nemo_jax.core.types import Array
from nemo_jax.search import blocks, variation


@struct.dataclass
class State(base.State):
  """State with a population [P, D] and fitness [P], the fields of evosax."""

  # Loosely typed: JAX also rebuilds this with other leaves than arrays.
  population: Any
  fitness: Any
  best_solution: Any
  best_fitness: Any
  generation_counter: Any


@struct.dataclass
class Params(base.Params):
  """Rates of the operators; those of the paper are not known.

  Attributes:
    mut_dist: probability that a tensor is mutated.
    cr_dist: probability that a tensor is crossed with that of the mate.
    std: of the Gaussian noise, in units of the tensor's root mean square.
    wanted: number of children to make, rounded up to whole blocks; the others
      are copies of the first.
  """

  # Numbers, or arrays while they are traced.
  mut_dist: Any = 0.5
  cr_dist: Any = 0.3
  std: Any = 0.3
  wanted: Any = np.iinfo(np.int32).max


class SSNE(base.PopulationBasedAlgorithm):
  """Tournament selection; crossover and mutation tensor by tensor."""

  def __init__(
    self,
    population_size: int,
    solution: base.Solution,
    fitness_shaping_fn: Callable = identity_fitness_shaping_fn,
    metrics_fn: Callable = base.metrics_fn,
    sizes: Sequence[int] | None = None,
  ):
    """Takes the arguments of evosax, and the sizes of the tensors.

    Args:
      population_size: P.
      solution: an example of a solution.
      fitness_shaping_fn: see evosax.
      metrics_fn: see evosax.
      sizes: of the tensors in a solution [D]; those of its leaves if absent.
    """
    super().__init__(population_size, solution, fitness_shaping_fn, metrics_fn)
    own = [leaf.size for leaf in jax.tree.leaves(solution)]
    self.sizes = np.asarray(own if sizes is None else sizes)

  # The base class annotates this as an attribute.
  @property
  def _default_params(  # ty: ignore[incompatible-property-override]
    self,
  ) -> Params:
    return Params()

  def _init(self, key: Array, params: Params) -> State:
    del key, params
    return State(
      population=jnp.full((self.population_size, self.num_dims), jnp.nan),
      fitness=jnp.full(self.population_size, jnp.inf),
      best_solution=jnp.full(self.num_dims, jnp.nan),
      best_fitness=jnp.inf,
      generation_counter=0,
    )

  def _by_tensor(self, key: Array, rate: Any, rows: int) -> Bool[Array, 'n D']:
    """Mask of the weights of random tensors, each with probability `rate`."""
    shape = (rows, len(self.sizes))
    return self._repeat(jax.random.bernoulli(key, rate, shape))

  def _repeat(self, values: Shaped[Array, 'n T']) -> Shaped[Array, 'n D']:
    """The value of each tensor, repeated for all weights in it."""
    # Not jnp.repeat: XLA broadcasts several times faster than it gathers.
    spread = [
      jnp.broadcast_to(column[:, None], (len(values), size))
      for column, size in zip(values.T, self.sizes, strict=True)
    ]
    return jnp.concatenate(spread, axis=1)

  def _spread(self, children: Float[Array, 'n D']) -> Float[Array, 'n D']:
    """Root mean square of the tensor of each weight, at least 0.1."""
    tensors = jnp.split(children, np.cumsum(self.sizes)[:-1], axis=1)
    square = [jnp.mean(tensor**2, axis=1) for tensor in tensors]
    # So that a tensor of zeros, such as a new bias, can change.
    return self._repeat(jnp.maximum(jnp.sqrt(jnp.stack(square, 1)), 0.1))

  def _breed(
    self, key: Array, state: State, params: Params, rows: int
  ) -> Float[Array, 'n D']:
    """Children [rows, D] by tournament selection, crossover and mutation."""
    keys = jax.random.split(key, 6)
    all_rows = jnp.ones(self.population_size, bool)
    pick = lambda k: variation.tournament(k, state.fitness, all_rows, rows)
    child, mate = (state.population[pick(k)] for k in keys[:2])
    swapped = self._by_tensor(keys[2], params.cr_dist, rows)
    swapped &= variation.coins(keys[3], child.shape)
    child = jnp.where(swapped, mate, child)
    noise = jax.random.normal(keys[4], child.shape) * self._spread(child)
    mutated = self._by_tensor(keys[5], params.mut_dist, rows)
    return child + mutated * params.std * noise

  def _ask(self, key, state, params):
    number, rows = blocks.divide(self.population_size, blocks.NETWORKS)
    children = blocks.fill(
      lambda key: self._breed(key, state, params, rows),
      blocks.keys(key, number),
      params.wanted,
    )
    return children[: self.population_size], state

  def _tell(self, key, population, fitness, state, params):
    del key, params
    return state.replace(population=population, fitness=fitness)
