"""Runs experiments in forks of a process that has imported them already.

  python -m benchmarks.forks search

reads JSON objects, one a line, with `folder`, `words` (flags), `output` and
`errors` (files), and answers each with the process id of the fork and, when it
has ended, its exit status. Forks save the time of the imports, and are
independent: the process that forks computes nothing.
"""

import importlib
import json
import os
import subprocess
import sys
import threading
import traceback
import warnings
from typing import NamedTuple

from experiments.launch import launch


class Ending(NamedTuple):
  """How an experiment ended."""

  status: int | None  # None if it did not end
  output: str
  errors: str


def _run(module, folder, words, output, errors) -> None:
  """Runs the experiment and ends this process."""
  os.chdir(folder)
  for number, path in ((1, output), (2, errors)):
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
  os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
  sys.argv = [module.__name__, *words]
  code = 1
  try:
    launch(module.run)
    code = 0
  except SystemExit as error:
    if isinstance(error.code, str):
      print(error.code, file=sys.stderr)
    else:
      code = error.code or 0
  except BaseException:  # printed as Python does at the end of a process
    traceback.print_exc()
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


def serve(name: str) -> None:
  """Runs an experiment for each line of the input."""
  module = importlib.import_module(f'experiments.{name}')
  # JAX warns of forks, but nothing has been computed yet.
  warnings.filterwarnings('ignore', 'os.fork', RuntimeWarning)
  for line in sys.stdin:
    child = os.fork()
    if not child:
      _run(module, **json.loads(line))
    print(child, flush=True)
    _, ended = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(ended), flush=True)


class Server:
  """A process with `serve`."""

  def __init__(self, name: str, root: os.PathLike):
    """Starts the process for an experiment; `root` is the project's folder."""
    # Without JAX's variables: compiled programs belong in the run's cache.
    own = {k: x for k, x in os.environ.items() if 'CACHE' not in k}
    self.process = subprocess.Popen(
      [sys.executable, '-m', 'benchmarks.forks', name],
      cwd=root,
      env=own,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )

  def run(self, folder, words, patience: float) -> Ending:
    """Ending of an experiment in a folder; it is killed after `patience` s."""
    paths = [os.path.join(folder, f'.{name}') for name in ('out', 'err')]
    order = {'folder': os.fspath(folder), 'words': list(words)}
    order |= dict(zip(('output', 'errors'), paths, strict=True))
    self.process.stdin.write(json.dumps(order) + '\n')
    self.process.stdin.flush()
    child = int(self.process.stdout.readline())
    late = threading.Timer(patience, os.kill, (child, 9))
    late.start()
    status = int(self.process.stdout.readline())
    late.cancel()
    said = []
    for path in paths:
      with open(path, encoding='utf-8', errors='replace') as file:
        said.append(file.read())
      os.unlink(path)
    return Ending(None if status == -9 else status, *said)

  def close(self) -> None:
    """Ends the process."""
    self.process.stdin.close()
    self.process.wait()


if __name__ == '__main__':
  serve(sys.argv[1])
