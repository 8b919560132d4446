"""The types of the search, and the legend of array shapes.

Letters used in shapes throughout the package:

  P  population size, which is also the number of evaluations per generation
  N  nodes of the graph, one decision each (for quantization: quantizers)
  K  choices at a node (bit-widths)
  Q  proposals of a species in a generation, at least P
  R  proposals of all species together
  H  evaluations that a surrogate keeps
  M  objectives, all minimised
  S  species
  A  capacity of the archive
  F  features of a node
  C  costs of a prior, known before anything is evaluated
  E  pairs of nodes with a joint cost

Masks are True where valid. An objective of +inf means "not evaluated" or
"failed"; a row with an objective that is not finite is never a solution.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import flax.struct
import jax
from jaxtyping import Bool, Float, Int, Integer

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
  'Select',
  'Species',
  'SpeciesBuilder',
  'Surrogate',
  'SurrogateBuilder',
]


class Prior(NamedTuple):
  """Additive model of a problem, known before anything is evaluated.

  `loss` estimates what a choice adds to the first objective, in an arbitrary
  unit. The costs are the other objectives, or the terms these are computed
  from; they are exact up to a constant. Lagrange multipliers weight them. A
  cost that is a product of two nodes' choices is a sum over `pairs`.
  """

  loss: Float[ArrayLike, 'N K']
  costs: Float[ArrayLike, 'N K C']
  pairs: Int[ArrayLike, 'E 2']  # of nodes
  pair_costs: Float[ArrayLike, 'E K K C']  # by the choices of both nodes


# A jraph.GraphsTuple whose nodes are an array [N, F]; jraph's own annotations
# allow any tree.
Graph = Any


@runtime_checkable
class Evaluate(Protocol):
  """Function from a configuration to its objectives; pure and traceable."""

  def __call__(
    self, data: PyTree, choices: Int[Array, ' N']
  ) -> Float[Array, ' M']:
    """Returns the objectives of `choices`, float32.

    Args:
      data: the problem's `data`.
      choices: the index of the choice at every node.
    """


@runtime_checkable
class KnownObjectives(Protocol):
  """Function from a configuration to all objectives but the first.

  It needs no evaluation, such as a run of a network on images.
  """

  def __call__(self, choices: Int[Array, ' N']) -> Float[Array, ' M-1']:
    """Returns the objectives of `choices` from the second on, float32."""


@flax.struct.dataclass
class Problem:
  """Graph with a choice at every node, and objectives of every configuration.

  All arrays that `evaluate` reads are in `data`. A problem can then be an
  argument of a jitted function, and no array is compiled into a program.

  Attributes:
    graph: nodes [N, F], in the order of the choices.
    data: arrays that `evaluate` reads.
    allowed: bool[N, K], the choices that the target can run.
    ideal: float32[M], the utopian point.
    reference: float32[M], the reference point of the hypervolume.
    evaluate: see `Evaluate`.
    objective_names: M names.
    mesh: devices that evaluate together, see `devices.make_mesh`; `evaluate`
      then runs on each within `jax.shard_map`.
    data_specs: partition specs of `data` on the mesh.
    prior: see `Prior`; None if nothing is known.
    known_objectives: see `KnownObjectives`; None if they are not known.
  """

  # Loosely typed: JAX also rebuilds this with other leaves than arrays.
  graph: Graph
  data: PyTree
  allowed: Any
  ideal: Any
  reference: Any
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
  """Result of a generation for one species.

  A species keeps one genotype for each row of the population. `source` is the
  place of the genotype of each surviving row: row `source` of the species'
  parents if `source < P`, else row `source - P` of its last proposals. In rows
  of other species `source` is the place of an arbitrary genotype, so that all
  arrays keep their shape.
  """

  population: Population  # [P, ...], the survivors of all species
  rank: Float[Array, ' P']  # in NSGA-III's order, 0 the best; +inf if empty
  own: Bool[Array, ' P']  # the survivors that belong to this species
  source: Int[Array, ' P']  # int32, the places of their genotypes
  fitness: Float[Array, ' Q']  # rank of each proposal; +inf if not evaluated
  learned: PyTree  # what `Surrogate.update` returned for species, or None


@runtime_checkable
class Init(Protocol):
  """Function that returns the first state of a species."""

  def __call__(self, key: Array) -> PyTree:
    """Returns the state, of the same shapes for every key."""


@runtime_checkable
class Ask(Protocol):
  """Function that returns the proposals of a species."""

  def __call__(
    self, key: Array, state: PyTree
  ) -> tuple[Integer[Array, 'Q N'], PyTree]:
    """Returns the choices of all proposals, and the next state.

    The search replaces a choice that a node does not allow by the nearest
    allowed one.
    """


@runtime_checkable
class Tell(Protocol):
  """Function that returns the state of a species after a generation."""

  def __call__(self, key: Array, state: PyTree, feedback: Feedback) -> PyTree:
    """Returns the state, of the same shapes and types as before."""


class Species(NamedTuple):
  """A search method: pure functions that propose configurations, and a state.

  Like `optax.GradientTransformation`, a species is a tuple of functions, and
  the state is passed in and returned. Only the species knows its genotype: a
  vector, the weights of a network, a table of probabilities.
  """

  init: Init
  ask: Ask
  tell: Tell
  # As `ask`, but with more proposals for a surrogate to choose from. If None,
  # `ask` is used.
  ask_more: Ask | None = None


@dataclasses.dataclass(frozen=True)
class SpeciesBuilder:
  """Function from a problem to a species; `BUILDER` in every species file.

  Attributes:
    make: (problem, population_size, **options) -> Species.
    needs_prior: whether the problem must have a `prior` with costs.
    options: keyword arguments of `make`.
  """

  make: Callable[..., Species]
  needs_prior: bool = False
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def __call__(self, problem: Problem, population_size: int) -> Species:
    """Returns the species for this problem and population size."""
    return self.make(problem, population_size, **self.options)

  def with_options(self, **options: Any) -> 'SpeciesBuilder':
    """Builder with further keyword arguments of `make`."""
    return dataclasses.replace(self, options={**self.options, **options})


class Surrogate(NamedTuple):
  """Model of the objectives, fitted to the evaluations so far.

  `select` decides which proposals are evaluated. Without it, these are the
  first new proposals of every species.
  """

  init: Callable[[], PyTree]  # () -> state
  # (key, state, evaluated [P, ...]) -> state, and what all species get as
  # `Feedback.learned`
  update: Callable[[Array, PyTree, Population], tuple[PyTree, PyTree]]
  select: 'Select | None' = None


@runtime_checkable
class Select(Protocol):
  """Function that selects the proposals to evaluate."""

  def __call__(
    self,
    key: Array,
    state: PyTree,
    archive: Population,
    proposals: Int[Array, 'R N'],
    proposer: Int[Array, ' R'],
    places: Int[Array, ' S'],
    count: int,
  ) -> Float[Array, ' R']:
    """Returns the round in which each proposal is picked; +inf if it is not.

    Rounds are whole numbers from 0, below `screening.ROUNDS`.

    Args:
      key: random key.
      state: of the surrogate.
      archive: the non-dominated solutions so far.
      proposals: choices of each proposal.
      proposer: species of each proposal; -1 if it must not be picked.
      places: how many proposals of each species may be picked.
      count: how many proposals may be picked in all.
    """


@runtime_checkable
class SurrogateBuilder(Protocol):
  """Function from a problem to its surrogate."""

  def __call__(self, problem: Problem) -> Surrogate | None:
    """Returns the surrogate; None if the problem lacks what it needs."""
