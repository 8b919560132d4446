"""How much memory the values of a program take."""

import math

from nemo_jax.quantization.trace.program import Program


def peak_bytes(program: Program) -> int:
  """Bytes of the values computed from the inputs that are alive at once.

  An upper bound of what a compiler that fuses and reuses needs for them; its
  own scratch space comes on top.
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
