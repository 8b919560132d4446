"""The types of the search, and the legend of array shapes.

Letters used in shape comments throughout the package:

  P  population size, which is also the evaluations of one generation
  N  nodes of the graph, one decision each (for quantization: quantizers)
  K  choices at a node (bit-widths)
  Q  proposals of a species in a generation, at least P
  R  proposals of all species together
  H  evaluations that are remembered
  M  objectives, all minimised
  S  species
  A  capacity of the archive
  F  features of a node
  C  costs that are known exactly, part of the objectives
  E  pairs of nodes that cost something together

Masks are True where valid. An objective of +inf means "not evaluated" or
"failed"; a row with one that is not finite never counts as a solution.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jraph

from nemo_jax.core.types import Array, PyTree
from nemo_jax.pareto.archive import Population


class Estimate(NamedTuple):
  """What is known of a problem before anything is evaluated: a sum over nodes.

  `loss` estimates what a choice adds to the first objective, in a unit of its
  own. Costs are known exactly but for a constant, and are what a searcher puts
  prices on: the other objectives, or what they are made of. Those that
  multiply two nodes are sums over pairs.
  """

  loss: Array  # [N, K] float32
  costs: Array  # [N, K, C] float32
  pairs: Array  # [E, 2] int32, nodes
  pair_costs: Array  # [E, K, K, C] float32, by the choices of both


@flax.struct.dataclass
class Problem:
  """A graph with a choice at every node, and a price on every assignment.

  Everything that `evaluate` reads travels in `data`, so that a problem is an
  ordinary argument of a jitted function and no array is baked into a program.
  """

  graph: (
    jraph.GraphsTuple
  )  # nodes [N, F]; the order of nodes is that of choices
  data: PyTree
  allowed: Array  # [N, K] bool, the choices that the target can run
  ideal: Array  # [M] float32, the utopian point
  reference: Array  # [M] float32, no better than this is worth nothing
  evaluate: Callable[[PyTree, Array], Array] = flax.struct.field(
    pytree_node=False
  )  # (data, choices [N] int32) -> objectives [M] float32
  objective_names: tuple[str, ...] = flax.struct.field(pytree_node=False)
  # Devices that evaluate together, see `devices.make_mesh`, and how `data` is
  # laid over them; `evaluate` then runs on each within `jax.shard_map`.
  mesh: jax.sharding.Mesh | None = flax.struct.field(
    pytree_node=False, default=None
  )
  data_specs: Any = flax.struct.field(
    pytree_node=False, default=jax.sharding.PartitionSpec()
  )
  estimate: Estimate | None = None  # what some searchers start from
  # choices [N] int32 -> all objectives but the first [M - 1], where these are
  # cheap to know.
  costs: Callable[[Array], Array] | None = flax.struct.field(
    pytree_node=False, default=None
  )


class Feedback(NamedTuple):
  """What one species learns at the end of a generation.

  The rows of a species' own genotypes run parallel to the rows of the
  population. `source` says where the genotype of each surviving row lies: in
  row `source` of its parents if `source < P`, else in row `source - P` of what
  it returned from the last `ask`. Rows of other species carry the row of an
  arbitrary genotype, which keeps every array full and every shape fixed.
  """

  population: Population  # the survivors of all species
  rank: Array  # [P] float32, place in the ranking, 0 the best; +inf if empty
  own: Array  # [P] bool, the survivors that belong to this species
  source: Array  # [P] int32, where their genotypes are
  fitness: Array  # [Q] float32, rank of each asked row; +inf if not evaluated
  learned: PyTree  # of the last evaluations, see `surrogate.learn`; or None


class Species(NamedTuple):
  """A way to propose solutions: three pure functions around a private state.

  The shape of the protocol is that of `optax.GradientTransformation`. How a
  solution is represented (a vector, the weights of a network, a table of
  priors) is known to the species alone.
  """

  init: Callable[[Array], PyTree]  # (key) -> state
  ask: Callable[[Array, PyTree], tuple[Array, PyTree]]
  # (key, state) -> (choices [Q, N] int32, state)
  # What a node does not allow is replaced by the nearest that it does.
  tell: Callable[[Array, PyTree, Feedback], PyTree]
  # (key, state, feedback) -> state
  # As `ask`, with more rows, for a surrogate to choose from; `ask` if None.
  ask_more: Callable[[Array, PyTree], tuple[Array, PyTree]] | None = None
  made_for: str | None = None  # see `contract.fingerprint`; any if None
