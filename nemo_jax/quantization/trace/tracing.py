"""Traces of a function of variables and images, for two images and for more."""

from typing import NamedTuple

import jax
import numpy as np

from nemo_jax.core.types import Array, InputError, PyTree, first_line
from nemo_jax.quantization.trace import analysis as analysis_lib
from nemo_jax.quantization.trace import examples
from nemo_jax.quantization.trace import program as program_lib
from nemo_jax.quantization.trace.program import Program

# Not one: with a single example products drop axes that they have for more.
FEW = 2


class Trace(NamedTuple):
  """A function of variables and images as a program, and what it quantizes."""

  program: program_lib.Program
  analysis: analysis_lib.Analysis
  outputs: PyTree  # of jax.ShapeDtypeStruct
  count: int  # of images


def leaf_names(variables: PyTree) -> list[str]:
  """Paths such as `Conv_0/kernel`; the collection `params` goes unsaid."""
  paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(variables)]
  names = [jax.tree_util.keystr(p, simple=True, separator='/') for p in paths]
  names = [n.removeprefix('params/').removesuffix('/value') for n in names]
  # A single array has no path.
  return [name or 'variables' for name in names]


_ARRAYS = (np.ndarray, np.generic, jax.Array, jax.ShapeDtypeStruct)


def _is_array(x) -> bool:
  return isinstance(x, _ARRAYS) and x.dtype != object


def check_variables(variables: PyTree, program: Program | None = None) -> None:
  """Raises `InputError` unless variables are arrays.

  Args:
    variables: of a function.
    program: if given, its trace, whose variables have the same shapes.
  """
  names, leaves = leaf_names(variables), jax.tree.leaves(variables)
  for name, leaf in zip(names, leaves, strict=True):
    if not _is_array(leaf):
      raise InputError(
        f'the variable {name!r} is a {type(leaf).__name__}; variables are '
        'arrays, make it one or close the function over it'
      )
  if program is None:
    return
  wanted = [program.avals[slot].shape for slot in program.inputs[:-1]]
  if len(wanted) != len(leaves):
    raise InputError(
      f'there are {len(leaves)} variables; the function has {len(wanted)}'
    )
  for name, leaf, shape in zip(names, leaves, wanted, strict=True):
    if leaf.shape != shape:
      raise InputError(
        f'the variable {name!r} has shape {leaf.shape}, not {shape}'
      )


def check_arguments(variables: PyTree, images: Array) -> None:
  """Raises `InputError` unless there are arrays, and a batch of images."""
  check_variables(variables)
  if not _is_array(images):
    raise InputError(
      f'images are a {type(images).__name__}; give one array [B, ...]'
    )
  if not images.shape:
    raise InputError('images have no axes; give one array [B, ...]')
  if not images.shape[0]:
    raise InputError('there are no images; give at least one image')


def trace(apply, variables, images, extra_ops) -> Trace:
  """The analyzed program for so many images."""
  check_arguments(variables, images)
  names = leaf_names(variables)
  program, outputs = program_lib.trace(apply, variables, images)
  analysis = analysis_lib.analyze(program, names, images.shape[0], extra_ops)
  return Trace(program, analysis, outputs, images.shape[0])


def _for(apply, variables, images, extra_ops, count: int) -> Trace:
  """The analyzed program for another number of images than there are.

  Raises:
    InputError: the function cannot be traced for so many.
  """
  shape = (count, *images.shape[1:])
  others = jax.ShapeDtypeStruct(shape, images.dtype)
  try:
    return trace(apply, variables, others, extra_ops)
  except (InputError, NotImplementedError):
    raise
  except Exception as error:  # the function's own
    raise InputError(
      f'apply cannot be traced for {count} of the {images.shape[0]} examples '
      f'({first_line(error)}); it has to work for any number of them'
    ) from error


def traces(apply, variables, images, extra_ops) -> tuple[Trace, Trace]:
  """The traces for two images and for more; the function treats each alike.

  What is repeated along the batch is counted once in the first.

  Arguments as for `transform.quantize`.

  Raises:
    InputError: it does not, or the arguments are no arrays.
    NotImplementedError: as for `transform.quantize`.
  """
  given = trace(apply, variables, images, extra_ops)
  count = max(images.shape[0], FEW + 1)
  of = lambda n: (
    given
    if n == images.shape[0]
    else _for(apply, variables, images, extra_ops, n)
  )
  few, many = of(FEW), of(count)
  programs = few.program, many.program
  analyses = few.analysis, many.analysis
  examples.check_sites(*analyses, count)
  examples.check_operations(*analyses, count)
  examples.check_static(programs, analyses, variables, count)
  return few._replace(analysis=examples.for_one(programs, analyses)), many
