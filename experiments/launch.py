"""What every experiment does around its work."""

import sys
from collections.abc import Callable

from absl import app, logging

from nemo_jax.base import InputError


def launch(run: Callable[[], None]) -> None:
  """Parses the flags and runs; what a user can mend ends in one line."""

  def main(argv):
    if len(argv) > 1:
      sys.exit(f'error: {argv[1]!r} is not a flag')
    # orbax tells of every step of every checkpoint.
    logging.set_verbosity(logging.WARNING)
    try:
      run()
    except InputError as error:
      sys.exit(f'error: {error}')
    except KeyboardInterrupt:
      sys.exit('stopped; the same command goes on from here')

  app.run(main)
