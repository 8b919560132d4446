"""Traces of a function of variables and inputs, for two examples and more."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import jax

from nemo_jax.core import batches
from nemo_jax.core.types import InputError, PyTree, first_line
from nemo_jax.quantization.trace import analysis as analysis_lib
from nemo_jax.quantization.trace import examples
from nemo_jax.quantization.trace import program as program_lib
from nemo_jax.quantization.trace.program import Program

# Examples of the small trace. With one example, products lose axes that they
# have with more.
FEW = 2


@runtime_checkable
class Apply(Protocol):
  """A network: any pure function of variables and inputs."""

  def __call__(self, variables: PyTree, inputs: PyTree, /) -> PyTree:
    """Returns the outputs; it has to do the same to each example."""


class Trace(NamedTuple):
  """A function as a program, with the analysis of its quantizers."""

  program: program_lib.Program
  analysis: analysis_lib.Analysis
  outputs: PyTree  # of jax.ShapeDtypeStruct
  count: int  # of examples


def leaf_names(variables: PyTree) -> list[str]:
  """Names of variables such as `Conv_0/kernel`, from their paths.

  The collection `params` of Flax is left out.
  """
  paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(variables)]
  names = [jax.tree_util.keystr(p, simple=True, separator='/') for p in paths]
  names = [n.removeprefix('params/').removesuffix('/value') for n in names]
  # A single array has no path.
  return [name or 'variables' for name in names]


def check_variables(variables: PyTree, program: Program | None = None) -> None:
  """Raises `InputError` unless variables are arrays of the right shapes.

  Args:
    variables: of a function.
    program: trace of the function, which has the shapes; None to check only
      that variables are arrays.
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
  """Number of examples.

  Raises:
    InputError: variables or inputs are not arrays, inputs differ in their
      number of examples, or there is none.
  """
  check_variables(variables)
  return batches.check(inputs)


def trace(
  apply: Apply, variables: PyTree, inputs: PyTree, extra_ops: Sequence[str]
) -> Trace:
  """The analyzed program of a function, for as many examples as given.

  Arguments as for `transform.quantize`.

  Raises:
    InputError: variables or inputs cannot be used, see `check_arguments`; or as
      for `analysis.analyze`.
    NotImplementedError: as for `analysis.analyze`.
  """
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
  """The analyzed program for `count` examples, whatever number is given.

  Raises:
    InputError: the function cannot be traced for this number.
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
  """The traces for two examples and for more, after checks that they agree.

  In the first, weights that are repeated along the batch are counted once.
  Arguments as for `transform.quantize`.

  Raises:
    InputError: the function does not do the same to each example, or as for
      `trace`.
    NotImplementedError: as for `trace`.
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
