"""What the reference shows beside docstrings: comments, and code in modules.

Fields of named tuples and constants are described by comments, and examples in
the docstring of a module are indented by two spaces. The first become
docstrings here, the second become code.
"""

import re
from typing import Any

import griffe


def comment(lines: list[str], first: int, last: int) -> str:
  """The comment of an attribute: behind it, or else in the lines before it.

  Args:
    lines: of the file.
    first: the line of the attribute, from 1.
    last: its last line.
  """
  _, _, behind = lines[last - 1].partition('  # ')
  if behind:
    return behind.strip()
  before = []
  for line in reversed(lines[: first - 1]):
    if not line.strip().startswith('# '):
      break
    before.insert(0, line.strip().removeprefix('# '))
  return ' '.join(before)


def is_described_here(attr: griffe.Attribute) -> bool:
  """Whether nothing else lists an attribute: a constant, or a bare field."""
  if attr.name.startswith('_'):
    return False
  owner = attr.parent
  if owner is None or owner.is_module:
    return attr.name.isupper()
  known = owner.docstring.value if owner.docstring else ''
  bases = [str(base) for base in getattr(owner, 'bases', ())]
  return 'NamedTuple' in bases and 'Attributes:' not in known


def with_code(text: str) -> str:
  """The text, with paragraphs that are indented by two spaces as code."""

  def fenced(match: re.Match) -> str:
    code = re.sub('^  ', '', match[2], flags=re.M).rstrip()
    kind = 'python' if ' = ' in code else 'text'
    return f'{match[1]}```{kind}\n{code}\n```\n\n'

  return re.sub(r'(\n\n)((?:  .+\n|\n(?=  ))+)', fenced, f'{text}\n')


class Comments(griffe.Extension):
  """Describes attributes by their comments."""

  def on_attribute_instance(
    self, *, node: Any, attr: griffe.Attribute, **kwargs: Any
  ) -> None:
    """Gives an attribute its comment as a docstring."""
    del node, kwargs
    if attr.docstring or not (attr.lineno and attr.endlineno):
      return
    lines = attr.lines_collection[attr.filepath]
    text = comment(lines, attr.lineno, attr.endlineno)
    if not text and is_described_here(attr):
      # What has no docstring at all is left out.
      text = '\u200b'
    if text:
      attr.docstring = griffe.Docstring(text, parent=attr)

  def on_module_instance(
    self, *, node: Any, mod: griffe.Module, **kwargs: Any
  ) -> None:
    """Makes code of the examples in the docstring of a module."""
    del node, kwargs
    if mod.docstring:
      mod.docstring.value = with_code(mod.docstring.value)
