"""Experiments to run: `python -m experiments.<name> --help`."""
