"""What is being done, for whoever watches."""

import contextlib
import time
from collections.abc import Generator
from typing import IO


class Log:
  """Says what is being done; nothing where there is no stream."""

  def __init__(self, stream: IO[str] | None = None):
    self._stream = stream

  def line(self, text: str = '') -> None:
    """Writes a line."""
    if self._stream is not None:
      print(text, file=self._stream, flush=True)

  @contextlib.contextmanager
  def stage(self, name: str) -> Generator[None]:
    """Says what is being done within, and how long it took."""
    if self._stream is not None:
      print(f'{name} ...', end=' ', file=self._stream, flush=True)
    start = time.monotonic()
    yield
    self.line(f'{time.monotonic() - start:.1f} s')
