"""Prints operations, quantizers and costs of a network, from its trace.

python -m experiments.workloads --workload=resnext101_32x8d \
    --extra_ops=add,pool
"""

from absl import flags as absl_flags

from experiments import flags
from experiments.launch import launch
from nemo_jax.quantization.transform import Structure

absl_flags.adopt_module_key_flags(flags)

HEAD = ('operation', 'kind', 'quantizers', 'parameters', 'MACs')


def table(structure: Structure) -> str:
  """Text table of operations; a shared quantizer has the same number in all."""
  rows = [HEAD]
  for op in structure.operations:
    numbers = [
      f'{"w" if structure.quantizers[i].is_weight else "a"}{i}'
      for i in op.operands
    ]
    counts = (f'{op.parameters:,}', f'{op.macs:,}')
    rows.append((op.name, op.kind, ' '.join(numbers), *counts))
  widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
  lines = []
  for row in rows:
    words = [x.ljust(w) for x, w in zip(row[:3], widths[:3], strict=True)]
    words += [x.rjust(w) for x, w in zip(row[3:], widths[3:], strict=True)]
    lines.append('  '.join(words))
  lines.insert(1, '-' * len(lines[0]))
  return '\n'.join(lines)


def check() -> None:
  """Raises `InputError` for flags that cannot be used."""
  flags.check_network()


def run() -> None:
  """Prints the table and the totals."""
  check()
  structure = flags.inspect_network()
  weights = sum(q.is_weight for q in structure.quantizers)
  total = len(structure.quantizers)
  costs = structure.costs
  print(table(structure))
  print()
  print(
    f'quantizers   {total}: {weights} weights, {total - weights} activations'
  )
  print(f'parameters   {costs.parameters:,}, {4 * costs.parameters:,} bytes')
  print(f'MACs         {costs.macs.sum():,} for one image')
  print(f'activations  {structure.bytes_per_image:,} bytes alive for one image')
  # Operations that stay in float, and variables that are not read.
  for title, names in (
    ('in float', structure.fixed),
    ('not read', structure.unread),
  ):
    if names:
      print(f'{title:13}{", ".join(names)}')


def main() -> None:
  """The command."""
  launch(run)


if __name__ == '__main__':
  main()
