"""Sub-structure neuroevolution (SSNE) as an evosax algorithm.

The evolutionary operators of NEMO's graph neural networks (arXiv 2106.07611),
after Khadka and Tumer 2018 and EGRL (arXiv 2007.07298): a network's tensors
are crossed and mutated one by one.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from evosax.algorithms.population_based import base
from evosax.core.fitness_shaping import identity_fitness_shaping_fn
from flax import struct

from nemo_jax.search import blocks, variation


@struct.dataclass
class State(base.State):
  """Population [P, D] and fitness [P]; nothing beside evosax's own."""


@struct.dataclass
class Params(base.Params):
  """Rates of the operators; the paper's values were not recovered.

  Attributes:
    mut_dist: probability that a tensor is mutated.
    cr_dist: probability that a tensor is crossed with that of the mate.
    std: of the Gaussian noise, in units of the tensor's own spread.
    wanted: how many children are made, in whole blocks; the others are copies
      of the first.
  """

  mut_dist: float = 0.5
  cr_dist: float = 0.3
  std: float = 0.3
  wanted: int = np.iinfo(np.int32).max


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
    """As evosax's own, but for the `sizes` of tensors in a solution [D]."""
    super().__init__(population_size, solution, fitness_shaping_fn, metrics_fn)
    own = [leaf.size for leaf in jax.tree.leaves(solution)]
    self.sizes = np.asarray(own if sizes is None else sizes)

  @property
  def _default_params(  # ty: ignore[incompatible-property-override]
    self,
  ) -> Params:
    return Params()

  def _init(self, key: jax.Array, params: Params) -> State:
    del key, params
    return State(
      population=jnp.full((self.population_size, self.num_dims), jnp.nan),
      fitness=jnp.full(self.population_size, jnp.inf),
      best_solution=jnp.full(self.num_dims, jnp.nan),
      best_fitness=jnp.inf,
      generation_counter=0,
    )

  def _by_tensor(self, key: jax.Array, rate: float, rows: int) -> jax.Array:
    """bool[rows, D]: each tensor of each child with probability `rate`."""
    shape = (rows, len(self.sizes))
    return self._repeat(jax.random.bernoulli(key, rate, shape))

  def _repeat(self, values: jax.Array) -> jax.Array:
    """[rows, D]: a value of each tensor [rows, T], for all weights in it."""
    # Not jnp.repeat: XLA broadcasts several times faster than it gathers.
    spread = [
      jnp.broadcast_to(column[:, None], (len(values), size))
      for column, size in zip(values.T, self.sizes, strict=True)
    ]
    return jnp.concatenate(spread, axis=1)

  def _spread(self, children: jax.Array) -> jax.Array:
    """float[rows, D]: root mean square of the tensor that a weight is in."""
    tensors = jnp.split(children, np.cumsum(self.sizes)[:-1], axis=1)
    square = [jnp.mean(tensor**2, axis=1) for tensor in tensors]
    # A tensor of zeros, such as a fresh bias, is moved on a scale of 0.1.
    return self._repeat(jnp.maximum(jnp.sqrt(jnp.stack(square, 1)), 0.1))

  def _breed(self, key, state, params, rows):
    keys = jax.random.split(key, 6)
    everyone = jnp.ones(self.population_size, bool)
    pick = lambda k: variation.tournament(k, state.fitness, everyone, rows)
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
