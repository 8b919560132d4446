"""Tables of methods side by side, in Markdown."""


def table(summary: list[dict]) -> str:
  """What `statistics.summarise` found, in Markdown, a table for each score.

  A cell has mean and 95 % interval; behind it, for all but the first method, on
  how many seeds the first is ahead.
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
