"""`Config`: the settings of a search, besides the network and its images."""

import dataclasses
import math
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from nemo_jax.core import checks, devices
from nemo_jax.core.types import InputError
from nemo_jax.quantization import sensitivity
from nemo_jax.quantization.backend import lowering
from nemo_jax.quantization.numerics import ranges
from nemo_jax.quantization.numerics import widths as widths_lib
from nemo_jax.quantization.ptq import reconstruct
from nemo_jax.quantization.structure import check_options
from nemo_jax.search import allocation
from nemo_jax.search import species as species_lib
from nemo_jax.search.problem import SpeciesBuilder
from nemo_jax.tasks import objectives as objectives_lib

# Methods that estimate sensitivities; with `none` a search has no prior.
SENSITIVITIES = ('none', *sensitivity.METHODS)


class FieldError(InputError):
  """A field of a `Config` cannot be used."""

  def __init__(self, field: str, reason: str):
    super().__init__(f'{field}: {reason}')
    self.field, self.reason = field, reason


@contextmanager
def _field(name: str) -> Generator[None]:
  """Context that turns an `InputError` into a `FieldError` of a field."""
  try:
    yield
  except InputError as error:
    raise FieldError(name, str(error)) from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Settings of a search, besides the network and its images.

  Attributes:
    calibration: method that chooses ranges, of `ranges.METHODS`.
    reconstruct: steps that reduce the error of each layer at every bit-width,
      of `reconstruct.STEPS`; none if empty.
    weight_scheme: scheme of weight quantizers, of `ranges.SCHEMES`.
    extra_ops: operations whose inputs are quantized besides those of products,
      see `quantize`.
    lowering: how operations are computed, see `quantize`.
    sensitivities: method that estimates the loss that each bit-width adds, of
      SENSITIVITIES.
    species: names of the species, see `species.team`.
    objectives: of `objectives.NAMES`, performance first.
    bit_widths: to choose from, ascending.
    population: evaluations of one generation.
    evaluations: budget, of which whole generations are used.
    seed: of the search.
    data_flow: the graph of the problem is the data flow between quantizers,
      rather than a chain.
    exploration: weight of the confidence bonus, see `nemo.make`.
    batch_size: candidates evaluated at once; if None, chosen by the MACs of an
      evaluation.
    image_devices: devices that divide the images of one candidate.
    memory_gib: GiB that activations may take; half of the device's memory if
      None.
  """

  calibration: str = 'least_squares'
  reconstruct: tuple[str, ...] = reconstruct.DEFAULT_STEPS
  weight_scheme: str = 'symmetric'
  extra_ops: tuple[str, ...] = ()
  lowering: str = 'backend'
  sensitivities: str = 'second_order'
  species: tuple[str, ...] = ('nemo',)
  objectives: tuple[str, ...] = objectives_lib.DEFAULT
  bit_widths: tuple[int, ...] = widths_lib.DEFAULT
  population: int = 60
  evaluations: int = 1800
  seed: int = 0
  data_flow: bool = False
  exploration: float = 1.0
  batch_size: int | None = None
  image_devices: int = 1
  memory_gib: float | None = None

  @property
  def generations(self) -> int:
    """Number of whole generations within the budget."""
    return self.evaluations // self.population

  def team(self) -> dict[str, SpeciesBuilder]:
    """Builders of the species, by name.

    Raises:
      InputError: a name is unknown, or repeated.
    """
    return species_lib.team(self.species)

  def settings(self) -> dict[str, Any]:
    """The fields that a result depends on, in JSON's types.

    Fields that depend on the machine are left out: a run may be resumed on
    another.
    """
    fields = dataclasses.asdict(self)
    for place in ('memory_gib', 'image_devices'):
      del fields[place]
    return {
      k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()
    }

  def check_quantization(self) -> None:
    """Raises `FieldError` for fields of quantization that cannot be used."""
    for name, choices in (
      ('calibration', ranges.METHODS),
      ('lowering', lowering.LOWERINGS),
      ('sensitivities', SENSITIVITIES),
    ):
      with _field(name):
        checks.choice('it', getattr(self, name), choices)
    with _field('weight_scheme'):
      check_options((), self.weight_scheme)
    with _field('extra_ops'):
      check_options(self.extra_ops, self.weight_scheme)
    with _field('reconstruct'):
      for step in self.reconstruct:
        checks.choice('a step', step, reconstruct.STEPS)
    if self.memory_gib is not None and not 0 < self.memory_gib < math.inf:
      raise FieldError('memory_gib', f'{self.memory_gib} is no memory')

  def check_search(self) -> None:
    """Raises `FieldError` for fields of the search that cannot be used."""
    with _field('bit_widths'):
      widths_lib.check_choices(self.bit_widths)
    with _field('objectives'):
      objectives_lib.check(self.objectives)
      if self.objectives[0] not in objectives_lib.PERFORMANCE:
        raise InputError(
          f'the first objective is {self.objectives[0]!r}; the choices are '
          f'{", ".join(objectives_lib.PERFORMANCE)}'
        )
    with _field('species'):
      team = self.team()
      if not team:
        raise InputError('there are no species; give at least one')
      needing = [name for name, builder in team.items() if builder.needs_prior]
      priced = set(self.objectives) & set(objectives_lib.COSTS)
      if needing and not (priced and self.sensitivities != 'none'):
        raise InputError(
          f'{needing[0]!r} needs sensitivities and a cost among the '
          f'objectives, of {", ".join(objectives_lib.COSTS)}'
        )
    with _field('evaluations'):
      checks.whole('it', self.evaluations)
    with _field('population'):
      checks.whole('it', self.population)
      allocation.check_size(self.population, len(team))
    with _field('evaluations'):
      if self.evaluations < self.population:
        raise InputError(
          f'{self.evaluations} are less than one generation of '
          f'{self.population}'
        )
    with _field('seed'):
      checks.whole('it', self.seed, least=0)
      # JAX would silently drop the bits above 32.
      if self.seed >= 2**32:
        raise InputError(f'{self.seed} is beyond {2**32 - 1}')
    if self.batch_size is not None:
      with _field('batch_size'):
        checks.whole('it', self.batch_size)
    with _field('exploration'):
      allocation.check_options(self.exploration, 'r2', len(self.objectives))
    with _field('image_devices'):
      devices.make_mesh(self.image_devices)
