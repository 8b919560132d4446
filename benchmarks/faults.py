"""What becomes of damaged files: every one is noticed, or changes nothing.

  python -m benchmarks.faults --damages=1000 --seed=0

makes a finished search and a half-finished one of two workloads, with all that
they read: caches, compiled programs, weights, and images. Then one file at a
time is damaged (a byte changed, the end cut off, or deleted), and the command
of the search is given again. It prints how often each of these came out:

  equal               the same front, byte for byte
  rebuilt             the same front, after a warning
  refused             one line, and exit status 1
  silent difference   another front
  traceback           anything else that ended it
  hang                no end within --patience seconds

and exits with status 1 if any of the last three did.
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
flags.DEFINE_integer('damages', 1000, 'how many', 1)
flags.DEFINE_integer('seed', 0, 'of what is damaged, and how')
flags.DEFINE_integer('workers', 1, 'searches at a time', 1)
flags.DEFINE_integer('patience', 600, 'seconds of a search that hangs', 1)

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
  """How often a search said that something was wrong."""
  said = ending.output + ending.errors
  return said.lower().count('warning') + said.count('damaged')


def run(server: Server, folder: pathlib.Path, case: str) -> Ending:
  """How the search of a case ends in a folder."""
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
  """Finished and half-finished runs, with all they read; how they end again.

  Searches run in `live` alone: what caches are named by depends on the path.
  """
  live, endings = folder / 'live', {}
  live.mkdir(parents=True)
  make_data(live / 'data')
  for case in COMMANDS:
    first = run(server, live, case)
    if first.status != 0:
      raise RuntimeError(f'{case} fails undamaged: {first.errors}')
    shutil.copytree(live / 'run', folder / case / 'finished')
    # As a kill leaves it that comes before the last checkpoint.
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
  """Damages one file of a folder; says which, and how."""
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
  """One of the outcomes above."""
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
  """The outcome of one damage, and a line that says what was done."""
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
  """Every so many of the damages; prints those that came out badly."""
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
  """The harness."""
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
