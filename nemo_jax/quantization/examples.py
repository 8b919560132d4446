"""Whether a function treats every example of a batch alike.

What is quantized is decided by the trace for one example. A function may be
traced for any number of them, as long as it does the same to each.
"""

import jax
import jax.numpy as jnp
import numpy as np

from nemo_jax.base import InputError
from nemo_jax.quantization import program as program_lib
from nemo_jax.quantization.analysis import Analysis


def check_sites(one: Analysis, many: Analysis, count: int) -> None:
  """Raises `InputError` unless the same operands are quantized in both.

  Args:
    one: of the trace for one example.
    many: of another trace.
    count: its number of examples.
  """
  if one.sites == many.sites:
    return
  pairs = zip(one.sites, many.sites, strict=False)
  differing = next((pair for pair in pairs if pair[0] != pair[1]), None)
  if differing:
    what = f'{differing[0].operation!r} became {differing[1].operation!r}'
  else:
    what = f'there are {len(one.sites)} and {len(many.sites)} operands'
  raise InputError(
    f'apply does other operations for {count} examples than for one ({what}); '
    'it has to do the same to each example'
  )


def check_operations(one: Analysis, many: Analysis, count: int) -> None:
  """Raises `InputError` unless work and activations grow with the examples.

  Arguments as for `check_sites`.
  """
  for first, second in zip(one.operations, many.operations, strict=True):
    if (first.kind, first.macs) != (second.kind, second.macs):
      raise InputError(
        f'{first.name!r} is a {first.kind} of {first.macs:,} multiply-'
        f'accumulates for one example, a {second.kind} of {second.macs:,} for '
        f'each of {count}; apply has to do the same to each example'
      )
  for first, second in zip(one.quantizers, many.quantizers, strict=True):
    if not first.is_weight and first.elements != second.elements:
      raise InputError(
        f'{first.name!r} has {first.elements:,} values for one example, '
        f'{second.elements:,} for each of {count}; apply has to do the same to '
        'each example'
      )


def _numbers(avals) -> list[np.ndarray]:
  """Arrays of these shapes with numbers that no identity depends on."""
  draw = np.random.default_rng(0)

  def one(aval):
    if jnp.issubdtype(aval.dtype, jax.dtypes.prng_key):
      return jax.random.key(0)
    if jnp.issubdtype(aval.dtype, jnp.inexact):
      values = draw.uniform(0.5, 1.5, aval.shape)
      return jnp.asarray(values.astype(np.float32), aval.dtype)
    return jnp.zeros(aval.shape, aval.dtype)

  return [one(aval) for aval in avals]


def _values(program: program_lib.Program, slots: list[int]) -> list[np.ndarray]:
  """What is in some slots, not computed from images, for any variables."""
  part = program_lib.needed_for(program, slots)
  avals = [program.avals[slot] for slot in part.inputs[:-1]]
  found = program_lib.run(part, [*_numbers(avals), None])
  return [np.asarray(x, np.float32) for x in found]


def _is_repeated(first: np.ndarray, second: np.ndarray) -> bool:
  """Whether the second array is the first, repeated along axes of size 1.

  But for rounding, which differs between products of other sizes.
  """
  return (
    first.ndim == second.ndim
    and all(a in (1, b) for a, b in zip(first.shape, second.shape, strict=True))
    and np.allclose(np.broadcast_to(first, second.shape), second, rtol=1e-3)
  )


def check_weights(
  programs: tuple[program_lib.Program, program_lib.Program],
  analyses: tuple[Analysis, Analysis],
  count: int,
) -> None:
  """Raises `InputError` for a weight with other values for each example.

  One that is repeated along the batch, such as a learned query, is one tensor.
  That it is repeated is tried out, with any numbers as variables.

  Args:
    programs: for one example, and for `count`.
    analyses: of both.
    count: of examples.
  """
  weights = [
    site
    for site in analyses[0].sites
    if analyses[0].quantizers[site.quantizer].is_weight
  ]
  slots = [
    [analysis.slot(program, site) for site in weights]
    for program, analysis in zip(programs, analyses, strict=True)
  ]
  shapes = [
    [program.avals[slot].shape for slot in own]
    for program, own in zip(programs, slots, strict=True)
  ]
  if shapes[0] == shapes[1]:
    return
  constants = programs[1].constants.values()
  # What a traced function captured has no values yet.
  known = not any(isinstance(x, jax.core.Tracer) for x in constants)
  values = [
    _values(program, own) if known else own
    for program, own in zip(programs, slots, strict=True)
  ]
  for site, first, second, *pair in zip(weights, *shapes, *values, strict=True):
    if first != second and not (known and _is_repeated(*pair)):
      name = analyses[0].quantizers[site.quantizer].name
      raise InputError(
        f'the weight {name!r} has shape {first} for one example and {second} '
        f'for {count}, and is not repeated along the batch'
      )
