"""Experiments to run: `python -m experiments.<name> --help`."""

import sys

# While `python -m` looks for the program, and nowhere else. What programs
# import takes seconds, in which a signal may come.
if sys.argv[:1] == ['-m']:
  from experiments import signals

  signals.stop_on_signals()
