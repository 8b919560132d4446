"""Damages files of runs: each damage has to be found, or to change nothing.

  python -m benchmarks.faults --damages=1000 --seed=0

makes a finished and a half-finished search of two workloads, with all the files
that they read: caches, compiled programs, weights and images. Then it damages
one file at a time (a byte is changed, the end is cut off, or the file is
deleted) and repeats the command of the search. It prints the number of each
outcome:

  equal               the same front, byte for byte
  rebuilt             the same front, after a warning
  refused             one line, and exit status 1
  silent difference   another front
  traceback           any other error
  hang                no end within --patience seconds

and exits with status 1 if there is any of the last three.
"""

import collections
import concurrent.futures
import pathlib
import random
import shutil
import sys
import tempfile

import jax
import numpy as np
import PIL.Image
import safetensors.numpy
import tqdm
from absl import flags

from benchmarks import measure
from benchmarks.forks import Ending, Server
from experiments.launch import launch
from nemo_jax import workloads

FLAGS = flags.FLAGS
flags.DEFINE_integer('damages', 1000, 'number of damages', 1)
flags.DEFINE_integer('seed', 0, 'seed of the choice of damages')
flags.DEFINE_integer('workers', 1, 'searches at the same time', 1)
flags.DEFINE_integer('patience', 600, 'seconds after which a search hangs', 1)

BAD = ('silent difference', 'traceback', 'hang')
GENERATIONS = 4
COMMON = (
  '--workdir=run',
  '--cache=cache',
  f'--generations={GENERATIONS}',
  '--seed=0',
  '--species=direct,lagrangian',
  '--calibration=min_max',
  '--reconstruct=bias',
)
COMMANDS = {
  'digits': (
    '--workload=digits',
    '--population=6',
    '--sensitivities=second_order',
  ),
  'images': (
    '--workload=cifar10_resnet20',
    '--weights=data/weights.safetensors',
    '--data=data/train',
    '--validation=data/validation.npz',
    '--search_images=20',
    '--calibration_images=8',
    '--population=4',
    '--objectives=divergence,size',
    '--sensitivities=first_order',
  ),
}
ROOT = pathlib.Path(__file__).resolve().parent.parent


def warnings_of(ending: Ending) -> int:
  """Number of warnings in the output of a search."""
  said = ending.output + ending.errors
  return said.lower().count('warning') + said.count('damaged')


def run(server: Server, folder: pathlib.Path, case: str) -> Ending:
  """Ending of the search of a case in a folder."""
  return server.run(folder, [*COMMON, *COMMANDS[case]], FLAGS.patience)


def tensors_of(shapes) -> dict[str, np.ndarray]:
  """Random weights of a network, by the names and shapes of a checkpoint."""
  found = {}
  drawn = measure.draw_variables(shapes)
  for path, leaf in jax.tree_util.tree_leaves_with_path(drawn):
    module, name = (key.key for key in path[-2:])
    if name == 'kernel':
      order = (leaf.ndim - 1, leaf.ndim - 2, *range(leaf.ndim - 2))
      found[f'{module}.weight'] = np.ascontiguousarray(leaf.transpose(order))
    elif name == 'scale':
      found[f'{module}.weight'] = leaf
      found[f'{module}.running_mean'] = 0 * leaf
      found[f'{module}.running_var'] = leaf
    else:
      found[f'{module}.{name}'] = leaf
  return found


def make_data(folder: pathlib.Path) -> None:
  """Weights and images of the case `images`."""
  draw = np.random.default_rng(0)
  shapes = workloads.network('cifar10_resnet20').variables
  folder.mkdir()
  tensors = tensors_of(shapes)
  safetensors.numpy.save_file(tensors, folder / 'weights.safetensors')
  pixels = draw.integers(0, 256, (10, 4, 32, 32, 3), dtype=np.uint8)
  for label, images in enumerate(pixels):
    (folder / 'train' / f'class{label}').mkdir(parents=True)
    for i, image in enumerate(images):
      path = folder / 'train' / f'class{label}' / f'{i}.png'
      PIL.Image.fromarray(image).save(path)
  pixels = draw.integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
  np.savez(folder / 'validation.npz', x=pixels, y=np.arange(20) % 10)


def make_runs(server: Server, folder: pathlib.Path) -> dict[str, Ending]:
  """Makes finished and half-finished runs; returns endings of repeated runs.

  All searches run in `live`, since names in caches depend on the path.
  """
  live, endings = folder / 'live', {}
  live.mkdir(parents=True)
  make_data(live / 'data')
  for case in COMMANDS:
    first = run(server, live, case)
    if first.status != 0:
      raise RuntimeError(f'{case} fails undamaged: {first.errors}')
    shutil.copytree(live / 'run', folder / case / 'finished')
    # The files that there are after a kill before the last checkpoint.
    half = folder / case / 'half'
    ended = 'front.json', 'bank.npz', '*.png', str(GENERATIONS)
    keep_out = shutil.ignore_patterns(*ended)
    shutil.copytree(live / 'run', half, ignore=keep_out)
    endings[case] = run(server, live, case)
    shutil.rmtree(live / 'run')
  for name in ('cache', 'data'):
    shutil.copytree(live / name, folder / name)
  return endings


def damage(folder: pathlib.Path, draw: random.Random) -> str:
  """Damages a file of a folder; returns a description of the damage."""
  files = sorted(p for p in folder.rglob('*') if p.is_file())
  groups = sorted({path.parent for path in files})
  group = draw.choice(groups)
  path = draw.choice([p for p in files if p.parent == group])
  content, kind = path.read_bytes(), draw.choice(['flip', 'cut', 'delete'])
  place = draw.randrange(len(content)) if content else 0
  if kind == 'delete':
    path.unlink()
  elif kind == 'cut' or not content:
    path.write_bytes(content[:place])
  else:
    changed = bytes([content[place] ^ draw.randrange(1, 256)])
    path.write_bytes(content[:place] + changed + content[place + 1 :])
  return f'{kind} {path.relative_to(folder)} at {place} of {len(content)}'


def classify(ending: Ending, usual: Ending, equal: bool) -> str:
  """The outcome, as listed above, of an ending.

  Args:
    ending: after the damage.
    usual: without damage.
    equal: whether the fronts are the same.
  """
  if ending.status is None:
    return 'hang'
  if ending.status == 1:
    lines = ending.errors.strip().splitlines() or ['']
    told = [line.startswith('error: ') for line in lines]
    good = told[-1] and sum(told) == 1 and 'Traceback' not in ending.errors
    return 'refused' if good else 'traceback'
  if ending.status or 'Traceback' in ending.errors:
    return 'traceback'
  if not equal:
    return 'silent difference'
  return 'rebuilt' if warnings_of(ending) > warnings_of(usual) else 'equal'


def one(
  server: Server, folder: pathlib.Path, usual: dict, number: int
) -> tuple[str, str]:
  """The outcome of one damage, and a line that describes it."""
  draw = random.Random(f'{FLAGS.seed} {number}')
  case, stage = draw.choice([*COMMANDS]), draw.choice(['finished', 'half'])
  live = folder / 'live'
  shutil.rmtree(live)
  for name in ('cache', 'data'):
    shutil.copytree(folder / name, live / name)
  shutil.copytree(folder / case / stage, live / 'run')
  done = damage(live, draw)
  ending = run(server, live, case)
  front = live / 'run' / 'front.json'
  expected = (folder / case / 'finished' / 'front.json').read_bytes()
  equal = front.exists() and front.read_bytes() == expected
  outcome = classify(ending, usual[case], equal)
  said = (ending.errors.strip().splitlines() or [''])[-1][:200]
  return outcome, f'{number} {outcome}: {case} {stage}, {done}: {said}'


def work(root: pathlib.Path, worker: int) -> collections.Counter:
  """Outcomes of a worker's share of the damages; prints those that are bad."""
  folder, counts = root / str(worker), collections.Counter()
  server = Server('search', ROOT)
  usual = make_runs(server, folder)
  numbers = range(worker, FLAGS.damages, FLAGS.workers)
  for number in tqdm.tqdm(
    numbers, desc='damaging', disable=bool(worker) or None
  ):
    outcome, line = one(server, folder, usual, number)
    counts[outcome] += 1
    if outcome in BAD:
      print(line, flush=True)
  server.close()
  return counts


def main() -> None:
  """Damages files and prints the outcomes."""
  counts = collections.Counter()
  with tempfile.TemporaryDirectory(prefix='faults-') as name:
    root = pathlib.Path(name)
    with concurrent.futures.ThreadPoolExecutor(FLAGS.workers) as pool:
      for found in pool.map(lambda i: work(root, i), range(FLAGS.workers)):
        counts += found
  for outcome in ('equal', 'rebuilt', 'refused', *BAD):
    print(f'{outcome:20}{counts[outcome]:6}')
  if any(counts[outcome] for outcome in BAD):
    sys.exit(1)


if __name__ == '__main__':
  launch(main)
