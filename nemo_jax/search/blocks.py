"""Proposals in blocks: as many as a species needs, in arrays of fixed size.

Proposals beyond a species' places take time and are not evaluated, but the
number of places is not known when a program is compiled. So the arrays have
room for the most proposals, and a loop fills only the blocks that are needed.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Int

from nemo_jax.core.types import Array, PyTree

BLOCK = 128  # proposals per block, or up to twice as many in a single block
# Networks per block; their activations then fit in a CPU's cache.
NETWORKS = 64


def divide(count: int, most: int = BLOCK) -> tuple[int, int]:
  """Number of blocks, and rows of each, for `count` rows or slightly more.

  Blocks have at most `most` rows, except that one block replaces two.
  """
  number = -(-count // most)
  number = 1 if number == 2 else number
  return number, -(-count // number)


def keys(key: Array, number: int) -> Array:
  """Keys [number], one for each block; for a single block the key itself."""
  return key[None] if number == 1 else jax.random.split(key, number)


def num_proposals(places: Any, screened: bool = False) -> Int[Array, '']:
  """Number of proposals that a species with `places` places makes; int32.

  An eighth more than its places, because some may repeat others. A species
  without places makes as many as it can.

  Args:
    places: a whole number, of rows of the population; may be traced.
    screened: whether a surrogate chooses among the proposals, and they are fast
      to make: then twice as many, or half as many more for a large population.
  """
  more = places // 8
  if screened:
    more = jnp.minimum(places, jnp.maximum(places // 2, BLOCK // 2))
  most = jnp.iinfo(jnp.int32).max
  return jnp.where(places > 0, places + more, most).astype(jnp.int32)


def fill(
  make: Callable[[PyTree], PyTree],
  inputs: PyTree,
  rows_wanted: Any,
) -> PyTree:
  """Arrays [n B, ...] whose first `rows_wanted` rows or more are made.

  Args:
    make: function from the input of one block to arrays [B, ...].
    inputs: arrays [n, ...] with one row for each block, such as `keys`.
    rows_wanted: a whole number from 1; may be traced. The rows of blocks that
      are not needed are copies of the first row.
  """
  number = len(jax.tree.leaves(inputs)[0])
  one = jax.tree.map(lambda x: x[0], inputs)
  if number == 1:
    return make(one)
  shapes = jax.eval_shape(make, one)
  rows = len(jax.tree.leaves(shapes)[0])

  def more(state):
    block, _ = state
    return (block < number) & (block * rows < rows_wanted)

  def step(state):
    block, made = state
    new = make(jax.tree.map(lambda x: x[block], inputs))
    put = lambda old, x: jax.lax.dynamic_update_index_in_dim(old, x, block, 0)
    return block + 1, jax.tree.map(put, made, new)

  nothing = jax.tree.map(
    lambda x: jnp.zeros((number, *x.shape), x.dtype), shapes
  )
  end, made = jax.lax.while_loop(more, step, (jnp.int32(0), nothing))

  def finish(x):
    left = jnp.expand_dims(jnp.arange(number) >= end, range(1, x.ndim))
    return jnp.where(left, x[0, 0], x).reshape(-1, *x.shape[2:])

  return jax.tree.map(finish, made)


def asks(
  propose: Callable[[PyTree, Array], tuple[Array, PyTree]], number: int
) -> dict[str, Any]:
  """`ask` and `ask_more` of a species, as keyword arguments of `Species`.

  Args:
    propose: (state, key) -> choices and genotypes of one block. The state has
      the fields `own`, the rows of the species, and `offspring`.
    number: of blocks, see `divide`.
  """

  def ask_all(key, state, screened):
    choices, offspring = fill(
      lambda key: propose(state, key),
      keys(key, number),
      num_proposals(jnp.sum(state.own), screened),
    )
    return choices, state._replace(offspring=offspring)

  return {
    'ask': functools.partial(ask_all, screened=False),
    'ask_more': functools.partial(ask_all, screened=True),
  }
