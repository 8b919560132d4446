"""Checks that a function does the same to every example of a batch.

The trace for two examples decides what is quantized. The function is then run
with traces for any number of examples, which have to agree with it.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from nemo_jax.core.types import InputError, PyTree
from nemo_jax.quantization.trace import program as program_lib
from nemo_jax.quantization.trace.analysis import Analysis, Quantizer, Site
from nemo_jax.quantization.trace.program import Program

# How the names of primitives that draw random numbers begin.
_RANDOM = ('random_bits', 'rng_', 'threefry')


def check_sites(few: Analysis, many: Analysis, count: int) -> None:
  """Raises `InputError` unless the same operands are quantized in both.

  Args:
    few: analysis of the trace for two examples.
    many: analysis of another trace.
    count: number of examples of the other trace.
  """
  if few.sites == many.sites:
    return
  pairs = zip(few.sites, many.sites, strict=False)
  differing = next((pair for pair in pairs if pair[0] != pair[1]), None)
  if differing:
    what = f'{differing[0].operation!r} became {differing[1].operation!r}'
  else:
    what = f'there are {len(few.sites)} and {len(many.sites)} operands'
  raise InputError(
    f'apply does other operations for {count} examples than for 2 ({what}); it '
    'has to do the same to each example'
  )


def check_operations(few: Analysis, many: Analysis, count: int) -> None:
  """Raises `InputError` unless both traces do the same work for each example.

  Compared are kinds and MACs of operations, and elements of activations.
  Arguments as for `check_sites`.
  """
  for first, second in zip(few.operations, many.operations, strict=True):
    if (first.kind, first.macs) != (second.kind, second.macs):
      raise InputError(
        f'{first.name!r} is a {first.kind} of {first.macs:,} multiply-'
        f'accumulates for each of 2 examples, a {second.kind} of '
        f'{second.macs:,} for each of {count}; apply has to do the same to '
        'each example'
      )
  for first, second in zip(few.quantizers, many.quantizers, strict=True):
    if not first.is_weight and first.elements != second.elements:
      raise InputError(
        f'{first.name!r} has {first.elements:,} values for each of 2 examples, '
        f'{second.elements:,} for each of {count}; apply has to do the same to '
        'each example'
      )


def _static_operands(program: Program) -> list[tuple[str, int]]:
  """Operands that inputs are computed with, as (name of equation, slot).

  They are in order, and do not depend on the inputs. Integers are left out, as
  they may be the indices of examples.
  """
  static = program_lib.static_slots(program)
  return [
    (equation.name, slot)
    for equation in program.equations
    if not static.issuperset(equation.inputs)
    for slot in equation.inputs
    if slot in static and jnp.issubdtype(program.avals[slot].dtype, jnp.inexact)
  ]


def _text(program: Program, slots: list[int]) -> list[Any]:
  """The computation of some slots, as a list that can be compared."""
  part = program_lib.needed_for(program, slots)
  number: dict[int, Any] = {slot: i for i, slot in enumerate(part.inputs)}
  for slot, value in part.constants.items():
    known = program_lib.is_number(value)
    number[slot] = str(value) if known else program_lib.identity(value)
  lines = []
  for equation in part.equations:
    read = [number[slot] for slot in equation.inputs]
    lines.append((equation.name, read, str(equation.params)))
    for slot in equation.outputs:
      number[slot] = len(number)
  return [*lines, [number[slot] for slot in slots]]


def _numbers(leaf: Any) -> jax.Array:
  """The leaf; or random values of its shape if it has none, or is traced."""
  if not isinstance(leaf, jax.ShapeDtypeStruct | Tracer):
    return jnp.asarray(leaf)
  draw = np.random.default_rng(0)
  if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    return jax.random.key(0)
  if jnp.issubdtype(leaf.dtype, jnp.inexact):
    values = draw.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
    return jnp.asarray(values, leaf.dtype)
  return jnp.asarray(draw.integers(0, 2, leaf.shape), leaf.dtype)


def _values(
  program: Program, slots: list[int], leaves: list[jax.Array]
) -> list[np.ndarray]:
  """The values in some slots that do not depend on the inputs."""
  part = program_lib.needed_for(program, slots)
  found = program_lib.run_static(part, leaves)
  return [np.asarray(x, np.complex64) for x in found]


def _is_repeated(few: np.ndarray, many: np.ndarray) -> bool:
  """Whether both repeat one array along the axes in which they differ.

  Up to rounding, which depends on the sizes of products.
  """
  if few.ndim != many.ndim:
    return False
  sizes = zip(few.shape, many.shape, strict=True)
  first = tuple(slice(None) if a == b else slice(0, 1) for a, b in sizes)
  one = few[first]
  return all(
    np.allclose(np.broadcast_to(one, x.shape), x, rtol=1e-3, atol=1e-6)
    for x in (few, many)
  )


def _is_random(program: Program, slot: int) -> bool:
  """Whether a value is computed from random numbers, as noise is."""
  part = program_lib.needed_for(program, [slot])
  return any(e.name.startswith(_RANDOM) for e in part.equations)


def check_static(
  programs: tuple[Program, Program],
  analyses: tuple[Analysis, Analysis],
  variables: PyTree,
  count: int,
) -> None:
  """Raises `InputError` if operands depend on the number of examples.

  Floating-point operands that do not depend on the inputs have to have the same
  values for any number of examples, or to repeat one value for each of them, as
  a learned query does. Random numbers are exempt, unless they are weights.

  Args:
    programs: the programs for two examples and for `count`.
    analyses: their analyses.
    variables: of the function; those without values get random ones.
    count: number of examples.
  """
  found = [_static_operands(program) for program in programs]
  names = [[name for name, _ in own] for own in found]
  slots = [[slot for _, slot in own] for own in found]
  if names[0] != names[1]:
    raise InputError(
      f'apply does other operations for {count} examples than for 2; it has to '
      'do the same to each example'
    )
  texts = [_text(*pair) for pair in zip(programs, slots, strict=True)]
  if texts[0] == texts[1]:
    return
  constants = [x for p in programs for x in p.constants.values()]
  if any(isinstance(x, Tracer) for x in constants):
    raise InputError(
      'apply has captured traced arrays, and computes other numbers from them '
      'for other numbers of examples; give them as variables'
    )
  leaves = [_numbers(leaf) for leaf in jax.tree.leaves(variables)]
  values = [
    _values(program, own, leaves)
    for program, own in zip(programs, slots, strict=True)
  ]
  weights = {
    analyses[0].slot(programs[0], site)
    for site in analyses[0].sites
    if analyses[0].quantizers[site.quantizer].is_weight
  }
  for name, slot, few, many in zip(names[0], slots[0], *values, strict=True):
    noise = slot not in weights and _is_random(programs[0], slot)
    if not noise and not _is_repeated(few, many):
      shapes = (
        '' if few.shape == many.shape else f', {few.shape} and {many.shape}'
      )
      raise InputError(
        f"an operand of '{name}' is another for {count} examples than for 2"
        f'{shapes}; apply has to do the same to each example'
      )


def _kept(few: tuple[int, ...], many: tuple[int, ...]) -> list[int]:
  """Axes that do not grow with the number of examples."""
  return [i for i, (a, b) in enumerate(zip(few, many, strict=True)) if a == b]


def for_one(
  programs: tuple[Program, Program], analyses: tuple[Analysis, Analysis]
) -> Analysis:
  """The first analysis, with weights repeated along the batch counted once.

  Args:
    programs: the programs for two examples and for more, which `check_static`
      has accepted.
    analyses: their analyses.
  """
  few, many = analyses
  repeated: dict[Site, tuple[int, ...]] = {}
  grows: dict[int, set[int]] = {}
  for site in few.sites:
    if few.quantizers[site.quantizer].is_weight:
      shapes = [
        program.avals[analysis.slot(program, site)].shape
        for program, analysis in zip(programs, analyses, strict=True)
      ]
      kept = _kept(*shapes)
      axes = tuple(i for i in range(len(shapes[0])) if i not in kept)
      repeated |= {site: axes} if axes else {}
      grows.setdefault(site.quantizer, set()).update(axes)

  def one(index: int, quantizer: Quantizer) -> Quantizer:
    if not quantizer.is_weight:
      return quantizer
    shapes = [
      program.avals[analysis.roots[index]].shape
      for program, analysis in zip(programs, analyses, strict=True)
    ]
    axes = [a for a in quantizer.channel_axes if a not in grows[index]]
    doubled = len(quantizer.channel_axes) - len(axes)
    return quantizer._replace(
      channel_axes=tuple(axes),
      channels=quantizer.channels // 2**doubled,
      elements=int(np.prod([shapes[0][a] for a in _kept(*shapes)], dtype=int)),
    )

  quantizers = tuple(one(i, q) for i, q in enumerate(few.quantizers))
  operations = tuple(
    op._replace(parameters=quantizers[op.operands[-1]].elements)
    if op.parameters
    else op
    for op in few.operations
  )
  return few._replace(
    quantizers=quantizers, operations=operations, repeated=repeated
  )
