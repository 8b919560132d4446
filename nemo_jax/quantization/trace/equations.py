"""Equations of programs: primitives applied to values in slots."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.extend as jex
import jax.numpy as jnp

MATRIX_PRODUCTS = ('conv_general_dilated', 'dot_general')


class Equation(NamedTuple):
  """One primitive, applied to values in numbered slots."""

  eqn: jex.core.JaxprEqn
  inputs: tuple[int, ...]
  outputs: tuple[int, ...]

  @property
  def name(self) -> str:
    """The name of the primitive."""
    return self.eqn.primitive.name

  @property
  def params(self) -> dict[str, Any]:
    """The parameters of the primitive."""
    return self.eqn.params

  @property
  def in_avals(self) -> tuple[Any, ...]:
    """Shape and dtype of each input."""
    return tuple(v.aval for v in self.eqn.invars)

  @property
  def out_avals(self) -> tuple[Any, ...]:
    """Shape and dtype of each output."""
    return tuple(v.aval for v in self.eqn.outvars)


def bind(
  equation: Equation, operands: Sequence[Any], **changed: Any
) -> Sequence[Any]:
  """The outputs of an equation as it was traced.

  Args:
    equation: the primitive and its parameters.
    operands: arrays or numbers, one for each input.
    **changed: parameters that replace traced ones.
  """
  primitive = equation.eqn.primitive
  result = primitive.bind(
    *operands, **primitive.get_bind_params(equation.params | changed)
  )
  return result if primitive.multiple_results else [result]


def sub_jaxprs(eqn: jex.core.JaxprEqn) -> list[jex.core.Jaxpr]:
  """The jaxprs held in the parameters of an equation."""
  found = []
  for param in eqn.params.values():
    for value in param if isinstance(param, tuple | list) else (param,):
      if isinstance(value, jex.core.ClosedJaxpr):
        found.append(value.jaxpr)
      elif isinstance(value, jex.core.Jaxpr):
        found.append(value)
  return found


def _is_product(eqn: jex.core.JaxprEqn) -> bool:
  """Whether an equation sums products over an axis, judging by its name."""
  if not {'dot', 'conv'} & set(eqn.primitive.name.split('_')):
    return False
  if eqn.primitive.name != 'dot_general':
    return True
  (contracted, _), _ = eqn.params['dimension_numbers']
  return bool(contracted)


def matrix_products(eqn: jex.core.JaxprEqn) -> list[str]:
  """Names of the matrix products in an equation, at any depth.

  Products that sum over no axis, such as outer products, are multiplications
  and not matrix products. Products of integers are left out. Any other
  primitive with `dot` or `conv` as a word of its name counts, so that a kind of
  product that this package does not know is reported, not ignored.
  """
  if subs := sub_jaxprs(eqn):
    return [n for s in subs for e in s.eqns for n in matrix_products(e)]
  aval: Any = eqn.outvars[0].aval
  is_inexact = jnp.issubdtype(aval.dtype, jnp.inexact)
  return [eqn.primitive.name] if is_inexact and _is_product(eqn) else []
