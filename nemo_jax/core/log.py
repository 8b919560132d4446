"""Progress messages of long work."""

import contextlib
import time
from collections.abc import Generator
from typing import IO


class Log:
  """Writes progress messages to a stream; without a stream, nothing."""

  def __init__(self, stream: IO[str] | None = None):
    self._stream = stream

  def line(self, text: str = '') -> None:
    """Writes a line."""
    if self._stream is not None:
      print(text, file=self._stream, flush=True)

  @contextlib.contextmanager
  def stage(self, name: str) -> Generator[None]:
    """Context that writes the name of a stage, and the seconds it took."""
    if self._stream is not None:
      print(f'{name} ...', end=' ', file=self._stream, flush=True)
    start = time.monotonic()
    yield
    self.line(f'{time.monotonic() - start:.1f} s')
