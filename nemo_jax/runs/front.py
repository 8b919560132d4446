"""`Front`: what a search found, typed; JSON is how it is stored."""

import dataclasses
import os
import platform
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

import nemo_jax
from nemo_jax.core import files
from nemo_jax.core.types import InputError, PyTree
from nemo_jax.quantization.numerics import bank as bank_lib
from nemo_jax.quantization.trace.tracing import Apply
from nemo_jax.runs import model as model_lib
from nemo_jax.runs import schema, selection
from nemo_jax.runs.model import Model
from nemo_jax.runs.point import Point, objectives_of

if TYPE_CHECKING:
  import matplotlib.figure

# In which a front is kept, within its folder.
FRONT_FILE = 'front.json'


def _software() -> dict[str, str]:
  """Versions of what makes a front."""
  return {
    'nemo_jax': nemo_jax.__version__,
    'jax': jax.__version__,
    'python': platform.python_version(),
  }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Front:
  """What a search found. What an older file lacks is None or empty.

  Attributes:
    workload: name of the network and its data.
    objective_names: M of them, performance first.
    quantizers: names, in the order of `Point.bits`.
    points: non-dominated, sorted by their objectives.
    uniform: the same bits everywhere, for comparison.
    float_point: the float network; it has no bits.
    is_weight: whether each quantizer is of a weight, else of an activation.
    bit_widths: that the search chose from.
    species: names of those that searched.
    ideal: [M], the utopian point.
    reference: [M]; objectives no better than it are worth nothing.
    seed: of the search.
    evaluations: configurations that were evaluated.
    failures: how many of these had an objective that was not finite.
    hypervolume: of the points, between ideal and reference; of 1 at most.
    uniform_hypervolume: that of `uniform`.
    images: how many scored candidates, calibrated and tested; and their size.
    network: how the network is traced again, and digests of weights and bank.
    run: digest of what the run was started with.
    versions: of the software that found it.
    model: the network itself, which is not stored.
  """

  workload: str
  objective_names: tuple[str, ...]
  quantizers: tuple[str, ...]
  points: tuple[Point, ...]
  uniform: tuple[Point, ...] = ()
  float_point: Point | None = None
  is_weight: tuple[bool, ...] = ()
  bit_widths: tuple[int, ...] = ()
  species: tuple[str, ...] = ()
  ideal: tuple[float, ...] = ()
  reference: tuple[float, ...] = ()
  seed: int | None = None
  evaluations: int | None = None
  failures: int | None = None
  hypervolume: float | None = None
  uniform_hypervolume: float | None = None
  images: Mapping[str, int] = dataclasses.field(default_factory=dict)
  network: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  run: str | None = None
  versions: Mapping[str, str] = dataclasses.field(default_factory=_software)
  model: Model | None = dataclasses.field(
    default=None, compare=False, repr=False
  )

  def select(
    self,
    *,
    max_size_mb: float | None = None,
    max_gbitops: float | None = None,
    min_performance: float | None = None,
  ) -> Point:
    """The best point within limits.

    That is the one with the best performance; or, where a performance is asked
    for, the smallest that has it. Where no point is within all limits, the one
    that exceeds them least, as a share of each: its `shortfall` says what to
    give up, and so does a warning.

    Args:
      max_size_mb: millions of bytes of the whole model.
      max_gbitops: 10^9 bit-operations of one input.
      min_performance: accuracy on the images of the search, from 0 to 1.

    Raises:
      InputError: the front is empty, no limit is given, or its points lack what
        a limit is about.
    """
    return selection.select(
      self.points,
      (*self.objective_names, 'none')[0],
      max_size_mb=max_size_mb,
      max_gbitops=max_gbitops,
      min_performance=min_performance,
    )

  def apply(self, point: Point | int) -> Callable[[PyTree], PyTree]:
    """The network at a point, as a jitted function of inputs [B, ...].

    Args:
      point: one of the front's, or its index among `points`.

    Raises:
      InputError: the front has no network, see `load`; or no such point.
    """
    if self.model is None:
      raise InputError(
        'this front has no network; give Front.load the function and variables'
      )
    if not isinstance(point, Point):
      if not -len(self.points) <= point < len(self.points):
        raise InputError(f'point {point}: the front has {len(self.points)}')
      point = self.points[point]
    return model_lib.run_at(self.model, point.bits)

  def with_model(self, model: Model) -> 'Front':
    """The front with its network, for `apply`."""
    return dataclasses.replace(self, model=model)

  def plot(self) -> 'matplotlib.figure.Figure':
    """The first objective against each of the others."""
    from nemo_jax.runs import plots

    return plots.projections(self)

  def save(self, path: str | os.PathLike) -> None:
    """Writes the front, and the bank of its network, into a folder.

    Raises:
      InputError: the operating system refuses, for a full disk for example.
    """
    if self.model is not None:
      bank = self.model.quantized.bank
      bank_lib.save(files.local(path) / model_lib.BANK_FILE, bank)
    files.write_json(files.local(path) / FRONT_FILE, to_json(self), indent=1)

  @staticmethod
  def load(
    path: str | os.PathLike,
    apply: Apply | None = None,
    variables: PyTree = None,
    needed: Collection[str] = (),
  ) -> 'Front':
    """What `save` wrote.

    Args:
      path: the folder.
      apply: the network, for `Front.apply`.
      variables: its weights.
      needed: keys that have to be there, see `schema.validate`.

    Raises:
      files.DamagedError: the content differs from what was written.
      InputError: it is absent, of a version that is not known, or of other
        weights or another network than the given.
    """
    front = from_json(read(path, needed))
    if apply is None:
      return front
    model = model_lib.load(
      path, front.network, front.quantizers, apply, variables
    )
    return front.with_model(model)


def _point_to_json(point: Point) -> dict[str, Any]:
  content = dataclasses.asdict(point)
  del content['shortfall']
  return {k: v for k, v in content.items() if v is not None and v != ()}


def _point_from_json(content: Mapping[str, Any]) -> Point:
  names = {field.name for field in dataclasses.fields(Point)} - {'shortfall'}
  known: dict[str, Any] = {
    k: tuple(v) if isinstance(v, list) else v
    for k, v in content.items()
    if k in names
  }
  return Point(**known)


def to_json(front: Front) -> dict[str, Any]:
  """What JSON can hold of a front: the schema, version 2.

  `workload`, `seed`, `evaluations`, `objective_names`, `bit_widths`,
  `quantizers` (names, in the order of every `bits`), `points`: each with
  `bits`, `objectives` in the order of their names, `test_accuracy`, `size_mb`,
  `gbitops` and `species`. `run`, if there, is the digest of flags.json. Further
  keys may be added without a new version.
  """
  content = {
    field.name: getattr(front, field.name)
    for field in dataclasses.fields(front)
    if field.name not in ('model', 'points', 'uniform', 'float_point')
  }
  # What is absent or empty is left out, as in older files. A front of four
  # objectives has no hypervolume, which is stored as null.
  nullable = 'hypervolume', 'uniform_hypervolume'
  content = {
    k: v for k, v in content.items() if k in nullable or v not in (None, (), {})
  }
  content |= {
    'points': [_point_to_json(p) for p in front.points],
    'uniform': [_point_to_json(p) for p in front.uniform],
  }
  if front.float_point is not None:
    content['float'] = _point_to_json(front.float_point)
  return {'version': schema.VERSIONS[-1]} | content


def from_json(content: Mapping[str, Any]) -> Front:
  """The front that a valid content is of; what it lacks is marked absent."""
  names = {field.name for field in dataclasses.fields(Front)}
  names -= {'model', 'float_point'}
  found: dict[str, Any] = {
    k: tuple(v) if isinstance(v, list) else v
    for k, v in content.items()
    if k in names
  }
  for name in ('points', 'uniform'):
    found[name] = tuple(map(_point_from_json, content.get(name, ())))
  if 'float' in content:
    found['float_point'] = _point_from_json(content['float'])
  absent: dict[str, Any] = {
    'workload': '',
    'objective_names': (),
    'quantizers': (),
    'versions': {},
  }
  return Front(**absent | found)


def read(
  path: str | os.PathLike, needed: Collection[str] = ()
) -> dict[str, Any]:
  """The valid content of a folder's front.json.

  Raises:
    files.DamagedError: the content differs from what was written.
    InputError: it is absent, or of a version that is not known.
  """
  path = files.local(path) / FRONT_FILE
  content = files.read_json(path)
  version: Any = content.get('version')
  if version not in schema.VERSIONS:
    schema.validate(content, path)
  sealed = version > 1 or 'sha256' in content
  if sealed and not files.is_sealed(content):
    raise files.DamagedError(f'{path} is damaged: its digest does not match')
  return schema.validate(content, path, needed)


def choose_points(front: Front, bit_widths: Sequence[int]) -> dict[int, Point]:
  """For each uniform width, the cheapest point that performs no worse.

  Cheapest is the least mean of the costs, each in units of the uniform
  configuration's. A width that no point matches is left out.
  """
  values = objectives_of(front.points)
  chosen = {}
  for width in bit_widths:
    uniform = next((u for u in front.uniform if u.bits[0] == width), None)
    if uniform is None or not front.points:
      continue
    goal = np.asarray(uniform.objectives, float)
    cost = np.mean(values[:, 1:] / goal[1:], axis=1)
    cost = np.where(values[:, 0] <= goal[0], cost, np.inf)
    if np.isfinite(cost.min()):
      chosen[width] = front.points[int(np.argmin(cost))]
  return chosen
