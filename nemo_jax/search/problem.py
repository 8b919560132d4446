"""The types of the search, and the legend of array shapes.

Letters used in shapes throughout the package:

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
  C  costs of a prior, known before anything is evaluated
  E  pairs of nodes that cost something together

Masks are True where valid. An objective of +inf means "not evaluated" or
"failed"; a row with one that is not finite never counts as a solution.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import flax.struct
import jax

from nemo_jax.core.types import Array, ArrayLike, PyTree
from nemo_jax.pareto.archive import Population

__all__ = [
  'Evaluate',
  'Feedback',
  'Graph',
  'KnownObjectives',
  'Population',
  'Prior',
  'Problem',
  'Species',
  'SpeciesBuilder',
  'Surrogate',
  'SurrogateBuilder',
]


class Prior(NamedTuple):
  """What is known of a problem before anything is evaluated: sums over nodes.

  `loss` estimates what a choice adds to the first objective, in a unit of its
  own. Costs are exact up to a constant, and are what Lagrange multipliers are
  put on: the other objectives, or what these are made of. A cost that is a
  product of two nodes is a sum over pairs.
  """

  loss: ArrayLike  # [N, K] float32
  costs: ArrayLike  # [N, K, C] float32
  pairs: ArrayLike  # [E, 2] int32, nodes
  pair_costs: ArrayLike  # [E, K, K, C] float32, by the choices of both


# A jraph.GraphsTuple whose nodes are an array [N, F]; jraph's own annotations
# allow any tree.
Graph = Any


class Evaluate(Protocol):
  """The objectives of one configuration; pure and traceable."""

  def __call__(self, data: PyTree, choices: Array) -> Array:
    """Returns float32[M], of `choices` int32[N], with the problem's `data`."""


class KnownObjectives(Protocol):
  """All objectives but the first, where they need no evaluation."""

  def __call__(self, choices: Array) -> Array:
    """Returns float32[M - 1], of `choices` int32[N]."""


@flax.struct.dataclass
class Problem:
  """A graph with a choice at every node, and objectives of every assignment.

  Everything that `evaluate` reads is in `data`, so that a problem is an
  ordinary argument of a jitted function and no array is baked into a program.

  Attributes:
    graph: nodes [N, F], in the order of the choices.
    data: what `evaluate` reads.
    allowed: bool[N, K], the choices that the target can run.
    ideal: float32[M], the utopian point.
    reference: float32[M]; objectives no better than it are worth nothing.
    evaluate: see `Evaluate`.
    objective_names: M names.
    mesh: devices that evaluate together, see `devices.make_mesh`; `evaluate`
      then runs on each within `jax.shard_map`.
    data_specs: how `data` is laid over the mesh.
    prior: what some species start from, if anything is known.
    known_objectives: see `KnownObjectives`; None where they are not known.
  """

  graph: Graph
  data: PyTree
  allowed: ArrayLike
  ideal: ArrayLike
  reference: ArrayLike
  evaluate: Evaluate = flax.struct.field(pytree_node=False)
  objective_names: tuple[str, ...] = flax.struct.field(pytree_node=False)
  mesh: jax.sharding.Mesh | None = flax.struct.field(
    pytree_node=False, default=None
  )
  data_specs: Any = flax.struct.field(
    pytree_node=False, default=jax.sharding.PartitionSpec()
  )
  prior: Prior | None = None
  known_objectives: KnownObjectives | None = flax.struct.field(
    pytree_node=False, default=None
  )


class Feedback(NamedTuple):
  """What one species learns at the end of a generation.

  The rows of a species' own genotypes run parallel to the rows of the
  population. `source` says where the genotype of each surviving row is: in
  row `source` of its parents if `source < P`, else in row `source - P` of what
  it returned from the last `ask`. Rows of other species carry the row of an
  arbitrary genotype, which keeps every array full and every shape fixed.
  """

  population: Population  # the survivors of all species
  rank: Array  # [P] float32, place in the ranking, 0 the best; +inf if empty
  own: Array  # [P] bool, the survivors that belong to this species
  source: Array  # [P] int32, where their genotypes are
  fitness: Array  # [Q] float32, rank of each asked row; +inf if not evaluated
  learned: PyTree  # what the surrogate returned from `update`, or None


class Init(Protocol):
  """The first state of a species."""

  def __call__(self, key: Array) -> PyTree:
    """Returns the state, of the same shapes for every key."""


class Ask(Protocol):
  """Proposals of a species."""

  def __call__(self, key: Array, state: PyTree) -> tuple[Array, PyTree]:
    """Returns int32[Q, N] choices and the state.

    A choice that a node does not allow is replaced by the nearest allowed one.
    """


class Tell(Protocol):
  """The state of a species after a generation."""

  def __call__(self, key: Array, state: PyTree, feedback: Feedback) -> PyTree:
    """Returns the state, of the same shapes and types as before."""


class Species(NamedTuple):
  """A way to propose configurations: three pure functions and their state.

  The shape of the protocol is that of `optax.GradientTransformation`. How a
  configuration is represented (a vector, the weights of a network, a table of
  probabilities) is known to the species alone.
  """

  init: Init
  ask: Ask
  tell: Tell
  # As `ask`, with more rows for a surrogate to choose from; `ask` if None.
  ask_more: Ask | None = None


@dataclasses.dataclass(frozen=True)
class SpeciesBuilder:
  """Makes a species for a problem; every species file has one, `BUILDER`.

  Attributes:
    make: (problem, population_size, **options) -> Species.
    needs_prior: whether the problem has to have a `prior` with costs.
    options: keyword arguments of `make`.
  """

  make: Callable[..., Species]
  needs_prior: bool = False
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def __call__(self, problem: Problem, population_size: int) -> Species:
    """Returns the species, for this problem and population size alone."""
    return self.make(problem, population_size, **self.options)

  def with_options(self, **options: Any) -> 'SpeciesBuilder':
    """The builder with further keyword arguments of `make`."""
    return dataclasses.replace(self, options={**self.options, **options})


class Surrogate(NamedTuple):
  """A model of the objectives that learns from evaluations.

  It decides which of the proposals are evaluated; without `select` the search
  takes the first new ones of every species.
  """

  init: Callable[[], PyTree]  # () -> state
  # (key, state, evaluated [P, ...]) -> state, and what species are told; see
  # `Feedback.learned`
  update: Callable[[Array, PyTree, Population], tuple[PyTree, PyTree]]
  select: 'Select | None' = None


class Select(Protocol):
  """Which proposals are worth an evaluation."""

  def __call__(
    self,
    key: Array,
    state: PyTree,
    archive: Population,
    proposals: Array,
    proposer: Array,
    places: Array,
    count: int,
  ) -> Array:
    """Returns the round in which each proposal is picked, +inf where it is not.

    float32[R], whole numbers from 0, below `screening.ROUNDS`.

    Args:
      key: random key.
      state: of the surrogate.
      archive: the non-dominated points so far.
      proposals: int32[R, N].
      proposer: int32[R], the species of each; -1 where it must not be picked.
      places: int32[S], how many proposals of each species may be picked.
      count: how many are picked in all, at most.
    """


class SurrogateBuilder(Protocol):
  """Makes a surrogate for a problem."""

  def __call__(self, problem: Problem) -> Surrogate | None:
    """Returns the surrogate; None where the problem gives it nothing to use."""
