"""What every experiment does around its work."""

import sys
from collections.abc import Callable

import scipy.linalg  # noqa: F401 (loads the BLAS that JAX calls)
import threadpoolctl
from absl import app, logging

from nemo_jax.base import InputError


def launch(run: Callable[[], None]) -> None:
  """Parses the flags and runs; what a user can mend ends in one line."""

  def main(argv):
    if len(argv) > 1:
      sys.exit(f'error: {argv[1]!r} is not a flag')
    # orbax tells of every step of every checkpoint.
    logging.set_verbosity(logging.WARNING)
    # Its threads get in each other's and XLA's way: the factor of a matrix of
    # 256 rows may take a hundred times as long.
    threadpoolctl.threadpool_limits(1, user_api='blas')
    try:
      run()
    except InputError as error:
      sys.exit(f'error: {error}')
    except KeyboardInterrupt:
      sys.exit('stopped; the same command goes on from here')

  app.run(main)
