"""SIGINT and SIGTERM end an experiment at once, with one line."""

# Imported before everything else, so that the handlers are set early.
import os
import signal

SIGNALS = (signal.SIGINT, signal.SIGTERM)
STOPPED = 'stopped; the same command goes on from here'


def _stop(number: int, frame: object = None) -> None:
  """Ends the process with one line and the exit status of a signal."""
  try:
    # There may be a progress bar on the line.
    start = '\n' if os.isatty(2) else ''
    os.write(2, f'{start}{STOPPED}\n'.encode())
  finally:
    os._exit(128 + number)


def _leave_to_thread(number: int, frame: object) -> None:
  """Does nothing: `_wait_and_stop` gets the signal as well, and earlier."""


def _wait_and_stop(pipe: int) -> None:
  """Ends the process when the number of one of SIGNALS is in the pipe."""
  while (number := os.read(pipe, 1)[0]) not in SIGNALS:
    pass
  _stop(number)


def _restore_in_child() -> None:
  """Sets Python's default handlers in a forked process."""
  signal.set_wakeup_fd(-1)
  signal.signal(signal.SIGINT, signal.default_int_handler)
  signal.signal(signal.SIGTERM, signal.SIG_DFL)


def stop_on_signals() -> None:
  """Sets handlers by which SIGINT and SIGTERM end the process at once.

  No clean-up is needed: files are written atomically, and locks end with the
  process. Signals that are ignored, as under nohup, stay ignored.
  """
  handled = [n for n in SIGNALS if signal.getsignal(n) != signal.SIG_IGN]
  if not handled or signal.getsignal(handled[-1]) is _leave_to_thread:
    return
  for number in handled:
    signal.signal(number, _stop)
  # Python runs a handler only when its main thread returns from native code,
  # and XLA may compile for minutes. A thread that reads a pipe wakes at once.
  import threading

  read, write = os.pipe()
  os.set_blocking(write, False)
  signal.set_wakeup_fd(write, warn_on_full_buffer=False)
  os.register_at_fork(after_in_child=_restore_in_child)
  threading.Thread(target=_wait_and_stop, args=(read,), daemon=True).start()
  for number in handled:
    signal.signal(number, _leave_to_thread)
