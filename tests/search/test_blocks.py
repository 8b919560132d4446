"""Blocks of proposals: those that are wanted are made, and no others."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_jax.search import blocks


@given(st.integers(1, 3000), st.integers(1, 300))
def test_blocks_hold_all_and_few_more(count, most):
  number, size = blocks.divide(count, most)
  assert count <= number * size < count + number
  assert size <= (most if number > 1 else 2 * most)
  assert number != 2


@functools.partial(jax.jit, static_argnums=1)
def numbered(wanted, number):
  """Rows of (their number, their key), made in blocks of four."""
  make = lambda block: (block[0] * jnp.ones(4), jax.random.uniform(block[1], 4))
  inputs = 1.0 + jnp.arange(number), blocks.keys(jax.random.key(0), number)
  return blocks.fill(make, inputs, wanted)


@pytest.mark.parametrize('wanted', [1, 4, 5, 11, 12, 40])
def test_of_the_blocks_those_that_are_wanted_are_made(wanted):
  block, draw = numbered(wanted, 3)
  made = min(12, -(-wanted // 4) * 4)
  np.testing.assert_array_equal(block[:made], np.repeat([1, 2, 3], 4)[:made])
  assert len(np.unique(draw[:made])) == made
  # The others are copies of the first row.
  np.testing.assert_array_equal(block[made:], 1)
  np.testing.assert_array_equal(draw[made:], draw[0])
  assert len(draw) == 12


def test_a_single_block_is_made_whatever_is_wanted_by_the_key_itself():
  block, draw = numbered(0, 1)
  np.testing.assert_array_equal(block, 1)
  np.testing.assert_array_equal(draw, jax.random.uniform(jax.random.key(0), 4))


def test_blocks_under_vmap_are_made_for_each():
  many = jax.jit(jax.vmap(numbered, in_axes=(0, None)), static_argnums=1)
  wanted = np.array([2, 9, 5])
  for one, (block, draw) in zip(
    wanted, zip(*many(wanted, 3), strict=True), strict=True
  ):
    expected = numbered(one, 3)
    np.testing.assert_array_equal(block, expected[0])
    np.testing.assert_array_equal(draw, expected[1])


def test_more_are_wanted_than_there_are_places():
  assert blocks.num_proposals(np.int32(80)) == 90
  assert blocks.num_proposals(np.int32(2)) == 2
  assert blocks.num_proposals(np.int32(60), screened=True) == 120
  assert blocks.num_proposals(np.int32(80), screened=True) == 144
  assert blocks.num_proposals(np.int32(200), screened=True) == 300
  # Before there are any, all.
  assert blocks.num_proposals(np.int32(0)) > 10**6
