"""How an experiment ends when it is told to stop."""

# Loaded before all else, so that few signals come too early for the handlers.
import os
import signal

SIGNALS = (signal.SIGINT, signal.SIGTERM)
STOPPED = 'stopped; the same command goes on from here'


def _stop(number: int, frame=None) -> None:
  """Ends the process with one line and the exit status of a signal."""
  try:
    # A progress bar may stand on the line.
    start = '\n' if os.isatty(2) else ''
    os.write(2, f'{start}{STOPPED}\n'.encode())
  finally:
    os._exit(128 + number)


def _leave_to_thread(number: int, frame) -> None:
  """Does nothing: `_wait_and_stop` is told as well, and sooner."""


def _wait_and_stop(pipe: int) -> None:
  """Stops when the number of one of SIGNALS comes from the pipe."""
  while (number := os.read(pipe, 1)[0]) not in SIGNALS:
    pass
  _stop(number)


def _restore_in_child() -> None:
  """Gives a forked process the usual handlers; its parent keeps the pipe."""
  signal.set_wakeup_fd(-1)
  signal.signal(signal.SIGINT, signal.default_int_handler)
  signal.signal(signal.SIGTERM, signal.SIG_DFL)


def stop_on_signals() -> None:
  """From now on SIGINT and SIGTERM end the process at once, with one line.

  Nothing is left to be done at the end: files are written whole or not at all,
  and locks go with the process. Signals that are ignored stay so, as under
  nohup.
  """
  handled = [n for n in SIGNALS if signal.getsignal(n) != signal.SIG_IGN]
  if not handled or signal.getsignal(handled[-1]) is _leave_to_thread:
    return
  for number in handled:
    signal.signal(number, _stop)
  # Python calls a handler when its main thread returns from what it is in, and
  # XLA may compile for minutes. A thread is told by a pipe at once.
  import threading

  read, write = os.pipe()
  os.set_blocking(write, False)
  signal.set_wakeup_fd(write, warn_on_full_buffer=False)
  os.register_at_fork(after_in_child=_restore_in_child)
  threading.Thread(target=_wait_and_stop, args=(read,), daemon=True).start()
  for number in handled:
    signal.signal(number, _leave_to_thread)
