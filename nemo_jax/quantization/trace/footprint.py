"""The memory that the values of a program take."""

import math

from nemo_jax.quantization.trace.program import Program


def peak_bytes(program: Program) -> int:
  """Most bytes of values that depend on the inputs and are alive at once.

  A compiler that fuses operations and reuses memory needs at most so much for
  them, and its own scratch space on top.
  """
  last = {slot: len(program.equations) for slot in program.outputs}
  for index, equation in reversed(list(enumerate(program.equations))):
    for slot in equation.inputs:
      last.setdefault(slot, index)
  size = lambda slot: (
    math.prod(program.avals[slot].shape) * program.avals[slot].dtype.itemsize
  )
  alive, dynamic = set(program.examples), set(program.examples)
  total = most = sum(map(size, program.examples))
  for index, equation in enumerate(program.equations):
    if dynamic.isdisjoint(equation.inputs):
      continue
    made = [slot for slot in equation.outputs if slot in last]
    dynamic |= set(made)
    alive |= set(made)
    total += sum(map(size, made))
    most = max(most, total)
    done = {s for s in equation.inputs if s in alive and last[s] == index}
    alive -= done
    total -= sum(map(size, done))
  return most
