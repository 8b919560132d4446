"""Tables of compared methods, in Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any


def table(summary: Sequence[Mapping[str, Any]]) -> str:
  """Markdown of a summary, with a table for each score.

  A cell has the mean and its 95 % interval; and, for all but the first method,
  the number of seeds on which the first is ahead.

  Args:
    summary: from `statistics.summarise`.
  """
  methods = list(dict.fromkeys(row['method'] for row in summary))
  scores = list(dict.fromkeys(row['score'] for row in summary))
  at = {(r['method'], r['evaluations'], r['score']): r for r in summary}
  lines = []
  for score in scores:
    rows = [row for row in summary if row['score'] == score]
    marks = list(dict.fromkeys(row['evaluations'] for row in rows))
    lines.append(f'| {score} | {" | ".join(f"{m:,}" for m in marks)} |')
    lines.append('|---' * (1 + len(marks)) + '|')
    for method in methods:
      cells = []
      for mark in marks:
        row = at[method, mark, score]
        cell = f'{row["mean"]:.4f} ± {row["interval"]:.4f}'
        if method != methods[0]:
          cell += f' ({row["ahead"]} of {row["seeds"]})'
        cells.append(cell)
      lines.append(f'| {method} | {" | ".join(cells)} |')
    lines.append('')
  return '\n'.join(lines)
