"""Proposals in blocks: as many as a species needs, in arrays of fixed size.

What a species proposes beyond its places takes time and is not evaluated; how
many places it has is not known when a program is compiled.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from nemo_jax.core.types import Array, PyTree

BLOCK = 128  # proposals that are made at once, or up to twice as many
# The same of networks: what they compute so stays in a CPU's cache.
NETWORKS = 64


def divide(count: int, most: int = BLOCK) -> tuple[int, int]:
  """How many blocks of how many rows hold `count` rows, and few more.

  A single block if two would do, else blocks of `most` rows at most.
  """
  number = -(-count // most)
  number = 1 if number == 2 else number
  return number, -(-count // number)


def keys(key: Array, number: int) -> Array:
  """A key for each block; that of a single block is the key itself."""
  return key[None] if number == 1 else jax.random.split(key, number)


def num_proposals(places: Array, screened: bool = False) -> Array:
  """int32[]: how many rows a species should propose that has so many places.

  An eighth more, for some may be repetitions; or twice as many, where they are
  made quickly and `surrogate` chooses among them, of many half as many more. As
  long as it has no places, as many as it can.
  """
  more = places // 8
  if screened:
    more = jnp.minimum(places, jnp.maximum(places // 2, BLOCK // 2))
  most = jnp.iinfo(jnp.int32).max
  return jnp.where(places > 0, places + more, most).astype(jnp.int32)


def fill(
  make: Callable[[PyTree], PyTree], inputs: PyTree, rows_wanted: Array
) -> PyTree:
  """Arrays [n B, ...], of which the rows that are wanted are made.

  Args:
    make: from one of the inputs to arrays [B, ...].
    inputs: [n, ...] each, one for a block, such as `keys`.
    rows_wanted: int32[], at least 1. Rows of further blocks are copies of the
      first row.
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
  """`ask` and `ask_more` of a species.

  Args:
    propose: (state, key) -> choices and genotypes of a block; the state has the
      species' `own` rows and its `offspring`.
    number: of the blocks, see `divide`.
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
