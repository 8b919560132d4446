"""Text tables of a run."""

from collections.abc import Mapping, Sequence

from nemo_jax.runs.front import Front, Point
from nemo_jax.runs.plots import as_good_as, label

# Bit-widths of the uniform configurations in a table.
SHOWN = (8, 6, 4, 2)


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
  """Lines with aligned cells: the first column left, the others right."""
  sizes = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  lines = []
  for row in rows:
    padded = [row[0].ljust(sizes[0])]
    padded += [c.rjust(s) for c, s in zip(row[1:], sizes[1:], strict=True)]
    lines.append('  '.join(padded).rstrip())
  return lines


def table(front: Front, chosen: Mapping[int, Point]) -> str:
  """Text table of the float network, uniform bit-widths and chosen points.

  Args:
    front: result of a run.
    chosen: from `front.choose_points`.
  """
  scored = front.float_point is not None and (
    front.float_point.test_accuracy is not None
  )
  head = ['', *map(label, front.objective_names)]
  head += ['test accuracy'] * scored + ['species']
  rows = [] if front.float_point is None else [('float', front.float_point)]
  for width in SHOWN:
    for point in front.uniform:
      if point.bits[0] == width:
        rows.append((f'uniform {width}-bit', point))
    if width in chosen:
      rows.append((as_good_as(width), chosen[width]))
  cells = [head]
  for name, point in rows:
    numbers = ['-' if x is None else f'{x:.4f}' for x in point.objectives]
    accuracy = []
    if scored:
      share = point.test_accuracy
      accuracy = ['-' if share is None else f'{100 * share:.2f} %']
    cells.append([name, *numbers, *accuracy, point.species or ''])
  lines = columns(cells)
  lines.insert(1, '-' * max(map(len, lines)))
  return '\n'.join(lines)
