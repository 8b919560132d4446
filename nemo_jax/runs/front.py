"""`Front`, the result of a search, and its JSON file."""

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

# Name of a front's file in its folder.
FRONT_FILE = 'front.json'


def _software() -> dict[str, str]:
  """Versions of the software that a front depends on."""
  return {
    'nemo_jax': nemo_jax.__version__,
    'jax': jax.__version__,
    'python': platform.python_version(),
  }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Front:
  """Result of a search. Values that an older file lacks are None or empty.

  Attributes:
    workload: name of the network and its data.
    objective_names: M names, performance first.
    quantizers: N names, in the order of `Point.bits`.
    points: the non-dominated points, sorted by their objectives.
    uniform: points with the same bit-width at all quantizers, for comparison.
    float_point: the float network, without bits.
    is_weight: for each quantizer, whether it is of a weight; else of an
      activation.
    bit_widths: the choices of the search.
    species: names of the species in the search.
    ideal: [M], the ideal point of the hypervolume.
    reference: [M], the reference point of the hypervolume.
    seed: of the search.
    evaluations: number of configurations that were evaluated.
    failures: number of these with an objective that was not finite.
    hypervolume: of the points, as a share of the box from ideal to reference;
      None if M is above 3.
    uniform_hypervolume: that of `uniform`.
    images: numbers of images by use, and the sides of an image.
    network: how the network is traced again, and digests of weights and bank.
    run: digest of the run's flags and files.
    versions: of the software that made the front.
    model: the network, which is not stored in the JSON file.
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

    It is the point with the best performance; if `min_performance` is given,
    the smallest model. If no point is within all limits, it is the point with
    the least sum of relative excesses: a warning and its `shortfall` name the
    limits that it exceeds.

    Args:
      max_size_mb: millions of bytes of the whole model.
      max_gbitops: 10^9 BitOps of one input.
      min_performance: accuracy on the images of the search, from 0 to 1.

    Raises:
      InputError: the front is empty, no limit is given, or the points lack the
        values that a limit needs.
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
      point: a point of the front, or its index in `points`.

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
    """Figure of the first objective against each of the others."""
    from nemo_jax.runs import plots

    return plots.projections(self)

  def save(self, path: str | os.PathLike) -> None:
    """Writes the front, and the bank of its network, into a folder.

    Raises:
      InputError: an error of the operating system, such as a full disk.
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
    """The front that `save` wrote.

    Args:
      path: the folder.
      apply: the network, which `Front.apply` needs; None leaves it out.
      variables: its weights.
      needed: keys that have to be there, see `schema.validate`.

    Raises:
      files.DamagedError: the content differs from what was written.
      InputError: there is no front, it has an unknown version, or it is of
        other weights or another network than those given.
    """
    front = from_json(read(path, needed))
    if apply is None:
      return front
    model = model_lib.load(
      path, front.network, front.quantizers, apply, variables
    )
    return front.with_model(model)


def _point_to_json(point: Point) -> dict[str, Any]:
  """The values of a point that are not absent, without `shortfall`."""
  content = dataclasses.asdict(point)
  del content['shortfall']
  return {k: v for k, v in content.items() if v is not None and v != ()}


def _point_from_json(content: Mapping[str, Any]) -> Point:
  """The point of a valid content; unknown keys are ignored."""
  names = {field.name for field in dataclasses.fields(Point)} - {'shortfall'}
  known: dict[str, Any] = {
    k: tuple(v) if isinstance(v, list) else v
    for k, v in content.items()
    if k in names
  }
  return Point(**known)


def to_json(front: Front) -> dict[str, Any]:
  """Content of a front's JSON file, in version 2 of the schema.

  The keys are the attributes of `Front` except `model`, with the float network
  under `float`. A point has the attributes of `Point` except `shortfall`.
  Absent values are left out. `schema.validate` checks the kinds of values.
  Further keys may be added without a new version.
  """
  content = {
    field.name: getattr(front, field.name)
    for field in dataclasses.fields(front)
    if field.name not in ('model', 'points', 'uniform', 'float_point')
  }
  # Absent or empty values are left out, as in older files, except that the
  # hypervolume of a front with four objectives is stored as null.
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
  """The front of a valid content; values that it lacks are None or empty."""
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
  """The content of a folder's front.json, validated.

  Args:
    path: the folder.
    needed: keys that have to be there, see `schema.validate`.

  Raises:
    files.DamagedError: the content differs from what was written.
    InputError: there is no front, it has an unknown version, or a value is not
      valid.
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
  """For each bit-width, the cheapest point no worse than uniform bits.

  A point qualifies if its performance is no worse than that of the uniform
  configuration. The cheapest has the least mean of its costs, each relative to
  that of the uniform configuration. Bit-widths without such a point are left
  out.

  Args:
    front: with uniform configurations.
    bit_widths: those of the uniform configurations.
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
