"""Pareto primitives on fixed-size arrays: pure, jittable, vmappable.

Every function takes `objectives [n, M]`, minimised, and an optional
`mask [n]`, True where a row is valid. A NaN objective counts as +inf. Inputs
are arrays or lists of numbers; integers, booleans and narrow floats are
converted to float32 (to float64 where JAX has it enabled). Other shapes and
types raise an `InputError` of one line, also while a function is traced. XLA
treats numbers below 1.2e-38 (denormals) as zero. No function allocates an
`n x n` array.
"""

from nemo_jax.pareto.archive import archive_insert, empty_population
from nemo_jax.pareto.duplicates import duplicated
from nemo_jax.pareto.indicators import hypervolume, r2, reference_directions
from nemo_jax.pareto.nsga3 import (
  associate,
  hyperplane_normalize,
  niching_order,
  nsga3_order,
)
from nemo_jax.pareto.sorting import (
  crowding_distance,
  dominates,
  nondominated_rank,
  order,
)

__all__ = [
  'archive_insert',
  'associate',
  'crowding_distance',
  'dominates',
  'duplicated',
  'empty_population',
  'hyperplane_normalize',
  'hypervolume',
  'niching_order',
  'nondominated_rank',
  'nsga3_order',
  'order',
  'r2',
  'reference_directions',
]
