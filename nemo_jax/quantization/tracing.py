"""Traces of a function of variables and images, for one image and for more."""

from typing import NamedTuple

import jax
import numpy as np

from nemo_jax.base import Array, InputError, PyTree, first_line
from nemo_jax.quantization import analysis as analysis_lib
from nemo_jax.quantization import examples
from nemo_jax.quantization import program as program_lib


class Trace(NamedTuple):
  """A function of variables and images as a program, and what it quantizes."""

  program: program_lib.Program
  analysis: analysis_lib.Analysis
  outputs: PyTree  # of jax.ShapeDtypeStruct


def leaf_names(variables: PyTree) -> list[str]:
  """Paths such as `Conv_0/kernel`; the collection `params` goes unsaid."""
  paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(variables)]
  names = [jax.tree_util.keystr(p, simple=True, separator='/') for p in paths]
  return [n.removeprefix('params/').removesuffix('/value') for n in names]


_ARRAYS = (np.ndarray, np.generic, jax.Array, jax.ShapeDtypeStruct)


def _is_array(x) -> bool:
  return isinstance(x, _ARRAYS) and x.dtype != object


def check_arguments(variables: PyTree, images: Array) -> None:
  """Raises `InputError` unless there are arrays, and a batch of images."""
  names = leaf_names(variables)
  for name, leaf in zip(names, jax.tree.leaves(variables), strict=True):
    if not _is_array(leaf):
      raise InputError(
        f'the variable {name!r} is a {type(leaf).__name__}; variables are '
        'arrays, make it one or close the function over it'
      )
  if not _is_array(images):
    raise InputError(
      f'images are a {type(images).__name__}; give one array [B, ...]'
    )
  if not images.shape:
    raise InputError('images have no axes; give one array [B, ...]')


def trace(apply, variables, images, also) -> Trace:
  """The analyzed program for so many images."""
  check_arguments(variables, images)
  names = leaf_names(variables)
  program, outputs = program_lib.trace(apply, variables, images)
  analysis = analysis_lib.analyze(program, names, images.shape[0], also)
  return Trace(program, analysis, outputs)


def _for(apply, variables, images, also, count: int) -> Trace:
  """The analyzed program for another number of images than there are.

  Raises:
    InputError: the function cannot be traced for so many.
  """
  shape = (count, *images.shape[1:])
  others = jax.ShapeDtypeStruct(shape, images.dtype)
  try:
    return trace(apply, variables, others, also)
  except (InputError, NotImplementedError):
    raise
  except Exception as error:  # the function's own
    raise InputError(
      f'apply cannot be traced for {count} of the {images.shape[0]} examples '
      f'({first_line(error)}); it has to work for any number of them'
    ) from error


def traces(apply, variables, images, also) -> tuple[Trace, Trace]:
  """The traces for one image and for more; the function treats each alike.

  Arguments as for `transform.quantize`.

  Raises:
    InputError: it does not, or the arguments are no arrays.
    NotImplementedError: as for `transform.quantize`.
  """
  given = trace(apply, variables, images, also)
  count = images.shape[0]
  if count == 1:
    count = 2
    one, many = given, _for(apply, variables, images, also, count)
  else:
    one, many = _for(apply, variables, images, also, 1), given
  examples.check_sites(one.analysis, many.analysis, count)
  examples.check_operations(one.analysis, many.analysis, count)
  examples.check_weights(
    (one.program, many.program), (one.analysis, many.analysis), count
  )
  return one, many
