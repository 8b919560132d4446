"""Experiments, run as commands: `python -m experiments.<name> --help`."""

import sys

# Only while `python -m` looks for the command, before its imports: these take
# seconds, during which a signal may arrive.
if sys.argv[:1] == ['-m']:
  from experiments import signals

  signals.stop_on_signals()
