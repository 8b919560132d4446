"""Traces of a function of variables and inputs, for two examples or more."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import jax

from nemo_jax.core import batches
from nemo_jax.core.types import InputError, PyTree, first_line
from nemo_jax.quantization.trace import analysis as analysis_lib
from nemo_jax.quantization.trace import examples
from nemo_jax.quantization.trace import program as program_lib
from nemo_jax.quantization.trace.program import Program

# Not one: with a single example products drop axes that they have for more.
FEW = 2


class Apply(Protocol):
  """A network: any pure function of variables and inputs."""

  def __call__(self, variables: PyTree, inputs: PyTree, /) -> PyTree:
    """Returns the outputs; does the same to each example."""


class Trace(NamedTuple):
  """A function of variables and inputs as a program, and what it quantizes."""

  program: program_lib.Program
  analysis: analysis_lib.Analysis
  outputs: PyTree  # of jax.ShapeDtypeStruct
  count: int  # of examples


def leaf_names(variables: PyTree) -> list[str]:
  """Paths such as `Conv_0/kernel`; the collection `params` goes unsaid."""
  paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(variables)]
  names = [jax.tree_util.keystr(p, simple=True, separator='/') for p in paths]
  names = [n.removeprefix('params/').removesuffix('/value') for n in names]
  # A single array has no path.
  return [name or 'variables' for name in names]


def check_variables(variables: PyTree, program: Program | None = None) -> None:
  """Raises `InputError` unless variables are arrays.

  Args:
    variables: of a function.
    program: if given, its trace, whose variables have the same shapes.
  """
  names, leaves = leaf_names(variables), jax.tree.leaves(variables)
  for name, leaf in zip(names, leaves, strict=True):
    if not batches.is_array(leaf):
      raise InputError(
        f'the variable {name!r} is a {type(leaf).__name__}; variables are '
        'arrays, make it one or close the function over it'
      )
  if program is None:
    return
  wanted = [program.avals[slot].shape for slot in program.variables]
  if len(wanted) != len(leaves):
    raise InputError(
      f'there are {len(leaves)} variables; the function has {len(wanted)}'
    )
  for name, leaf, shape in zip(names, leaves, wanted, strict=True):
    if leaf.shape != shape:
      raise InputError(
        f'the variable {name!r} has shape {leaf.shape}, not {shape}'
      )


def check_arguments(variables: PyTree, inputs: PyTree) -> int:
  """How many examples there are.

  Raises:
    InputError: variables or inputs are no arrays, or there is no example.
  """
  check_variables(variables)
  return batches.check(inputs)


def trace(
  apply: Apply, variables: PyTree, inputs: PyTree, extra_ops: Sequence[str]
) -> Trace:
  """The analyzed program for so many examples."""
  count = check_arguments(variables, inputs)
  names = leaf_names(variables)
  program, outputs = program_lib.trace(apply, variables, inputs)
  analysis = analysis_lib.analyze(program, names, count, extra_ops)
  return Trace(program, analysis, outputs, count)


def _for(
  apply: Apply,
  variables: PyTree,
  inputs: PyTree,
  extra_ops: Sequence[str],
  count: int,
) -> Trace:
  """The analyzed program for another number of examples than there are.

  Raises:
    InputError: the function cannot be traced for so many.
  """
  others = batches.like(inputs, count)
  try:
    return trace(apply, variables, others, extra_ops)
  except (InputError, NotImplementedError):
    raise
  except Exception as error:  # the function's own
    raise InputError(
      f'apply cannot be traced for {count} of the {batches.size(inputs)} '
      f'examples ({first_line(error)}); it has to work for any number of them'
    ) from error


def traces(
  apply: Apply, variables: PyTree, inputs: PyTree, extra_ops: Sequence[str]
) -> tuple[Trace, Trace]:
  """The traces for two examples and for more; the function treats each alike.

  What is repeated along the batch is counted once in the first.

  Arguments as for `transform.quantize`.

  Raises:
    InputError: it does not, or the arguments are no arrays.
    NotImplementedError: as for `transform.quantize`.
  """
  given = trace(apply, variables, inputs, extra_ops)
  count = max(given.count, FEW + 1)
  of = lambda n: (
    given if n == given.count else _for(apply, variables, inputs, extra_ops, n)
  )
  few, many = of(FEW), of(count)
  programs = few.program, many.program
  analyses = few.analysis, many.analysis
  examples.check_sites(*analyses, count)
  examples.check_operations(*analyses, count)
  examples.check_static(programs, analyses, variables, count)
  return few._replace(analysis=examples.for_one(programs, analyses)), many
