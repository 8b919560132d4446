"""The functions of a search: init, ask, tell, step and compile."""

from typing import NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float

from nemo_jax.core.types import Array, ArrayLike, PyTree
from nemo_jax.search.compilation import Compiled
from nemo_jax.search.screening import Asked
from nemo_jax.search.state import Metrics, State


@runtime_checkable
class Init(Protocol):
  """Function that returns the state before the first generation."""

  def __call__(self, key: Array) -> State:
    """Returns a state without evaluations, and with equal sizes of species."""


@runtime_checkable
class Ask(Protocol):
  """The first half of a generation: proposals."""

  def __call__(self, key: Array, state: State) -> tuple[Asked, State]:
    """Returns the candidates to evaluate, and the next state.

    Does not read the problem's data.

    Args:
      key: random key of the run, the same at every generation.
      state: from `init` or the last generation.

    Raises:
      InputError: what a species proposes is not an array of choices.
    """


@runtime_checkable
class Tell(Protocol):
  """The second half of a generation: ranking and survival."""

  def __call__(
    self,
    key: Array,
    state: State,
    asked: Asked,
    objectives: Float[ArrayLike, 'P M'],
  ) -> tuple[State, Metrics]:
    """Returns the next state, and metrics.

    Does not read the problem's data.

    Args:
      key: the key that `ask` got.
      state: the state that `ask` returned.
      asked: the candidates that `ask` returned.
      objectives: of `asked.choices`. A row with a value that is not finite is
        a failed evaluation.

    Raises:
      InputError: the objectives have another shape.
    """


@runtime_checkable
class Step(Protocol):
  """One generation: `ask`, an evaluation, `tell`."""

  def __call__(
    self, key: Array, state: State, data: PyTree = None
  ) -> tuple[State, Metrics]:
    """Returns the next state, and metrics.

    Pure, so that `jit`, `vmap` over keys and `lax.scan` over generations apply.

    Args:
      key: random key of the run, the same at every generation.
      state: from `init` or the last `step`.
      data: data of the problem; its own if absent. If passed as an argument of
        a jitted function, the data are not copied into the program.
    """


@runtime_checkable
class Compile(Protocol):
  """Function that compiles a generation for the problem's devices."""

  def __call__(self, key: Array, state: State) -> Compiled:
    """Returns the programs; see `compilation.compile_generation`."""


class Search(NamedTuple):
  """The functions of one search, for one problem and one team of species."""

  init: Init
  ask: Ask
  tell: Tell
  step: Step
  compile: Compile
