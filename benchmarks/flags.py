"""Tries bad flags: each has to be refused in one line that names the flag.

  python -m benchmarks.flags --combinations=500

gives every experiment flags of a wrong type, sign, size and more, one or two at
a time. Each combination is tried in its own process, which ends when the
experiment has checked its flags. Exits with status 1 if a combination is not
refused, or is refused in another way.
"""

import argparse
import collections
import importlib
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor

from absl import flags

from experiments.launch import launch
from nemo_jax import workloads

EXPERIMENTS = (
  'search',
  'compare',
  'evaluate',
  'knapsack',
  'sensitivity',
  'transfer',
  'prepare',
  'workloads',
)
SECONDS = 120.0  # after which a process hangs
_LONG = 'x' * 5000

# Bad values by the syntax of a flag in absl, and by what is wrong with them.
_BAD = {
  'a whole number': {
    'type': ('x', '1.5', '1e3', '0x10', '1_0', 'None', '[2]', '2,3'),
    'sign': ('-1', '-2147483648'),
    'size': ('9' * 30, '1' + '0' * 12, '1' + '0' * 5000),
    'emptiness': ('', ' '),
    'unicode': ('２', '٣', '½', '−1', '2\u00a0', '\udcff'),
    'control': ('1\n2', '\n', '2\t', '\x1b[31m2'),
    'not finite': ('nan', 'inf', '-inf', '1e999'),
  },
  'a number': {
    'type': ('x', '1,5', '[1]'),
    'sign': ('-1', '-0.5'),
    'size': ('-1e400',),
    'emptiness': ('', ' '),
    'unicode': ('２', '١', '\udcff'),
    'control': ('1\n2', '\x1b[31m'),
    'not finite': ('nan', '-inf'),
  },
  'a path': {
    'type': ('gs://bucket/x', 's3://bucket', 'file:///x', 'hdfs:/x'),
    'size': (_LONG, 'a/' + _LONG),
    'emptiness': ('',),
    'control': ('a\nb', '\n', 'a\tb', '\x7f', '\x1b[31m'),
    'unicode': ('~nobody-ü/x',),
  },
  'words between commas': {
    'type': ('no_such_word', '[2]', '-1', 'nan', 'a+b', '--x', 'none.py'),
    'size': (_LONG, '9' * 30),
    'emptiness': (',', ' ', ',,', 'a,', ',a'),
    'duplicates': ('{default},{default}', 'a,a'),
    'unicode': ('８', 'nemо', '２,４', '\udcff'),
    'control': ('a\nb', '8\n', '\x1b[31m8'),
  },
  'a word': {
    'type': ('no_such_word', '{default},{default}', '1'),
    'size': (_LONG,),
    'emptiness': ('', ' '),
    'unicode': ('dіgits', '\udcff'),
    'control': ('a\nb', '\x1b[31m'),
  },
  'a name': {
    'type': ('no_such_name', '{default},{default}', '1'),
    'file': ('none.py', '/dev/null/x.py', '~nobody-ü/x.py', 'no.module', '..'),
    'size': (_LONG, _LONG + '.py'),
    'emptiness': ('', ' '),
    'unicode': ('dіgits', '\udcff', '\udcff.py'),
    'control': ('a\nb', '\x1b[31m', 'a\nb.py'),
  },
  'true or false': {
    'type': ('maybe', '2', 'None'),
    'size': (_LONG,),
    'emptiness': ('', ' '),
    'unicode': ('１', '\udcff'),
    'control': ('true\n', 'a\nb'),
  },
}
# Flags that are wrong together, or for the digits; the message has to name the
# first.
_TOGETHER = {
  'search': (
    '--population=7',
    '--species=',
    '--species=paper,gcn',
    '--species=gcn:Adam',
    '--evaluations=5',
    '--generations=2147483647',
    '--objectives=size,divergence',
    '--objectives=divergence',
    '--bit_widths=8,4',
    '--bit_widths=4',
    '--species=nemo --sensitivities=none',
    '--species=direct,direct',
    '--species=none.py',
    '--workload=none.py',
    '--workload=no.such.module',
    '--image_devices=3',
    '--coordinator=localhost:1',
    '--processes=2',
    '--coordinator=x --processes=2 --process_id=0',
    '--coordinator=x:99999 --processes=2 --process_id=0',
    '--process_id=2 --processes=2 --coordinator=localhost:9000',
    '--distributed --processes=2',
    '--workdir=/dev/null/x',
    '--cache=/dev/null/x',
    '--weights=none.pth',
    '--weights=/dev/null',
    '--data=none',
    '--data=/dev',
    '--image_size=9',
    '--calibration_images=5',
    '--data --workload=resnet50',
    '--weights --workload=cifar10_resnet20',
    '--image_size=16 --workload=mobilenet_v2',
  ),
  'compare': (
    '--budget=5',
    '--population=3',
    '--methods=',
    '--methods=ants',
    '--methods=nemo@fast',
    '--methods=nemo@blind',
    '--methods=none.py',
    '--seeds=',
    '--seeds=01',
    '--seeds=4294967296',
    '--objectives=size',
    '--sensitivities=none',
    '--workdir=/dev/null/x',
  ),
  'evaluate': (
    '--bits=',
    '--bits=1',
    '--bits=w4',
    '--bits=33',
    '--front=none --bits=8',
    '--front=none',
    '--points=0',
  ),
  'knapsack': (
    '--budgets=',
    '--budgets=0MB',
    '--budgets=1e999MB',
    '--budgets=nanMB',
    '--budgets=-1G',
    '--budgets=1MB+1MB',
    '--budgets=0.000001G',
    '--budgets=2 --activation_bits=8',
    '--budgets=1GB',
    '--activation_bits=9',
    '--sensitivities=none',
  ),
  'sensitivity': ('--methods=measured --methods=measured',),
  'transfer': ('--budget=5', '--seeds=1,1', '--sensitivities=none'),
  'prepare': ('--tars=none', '--dataset=', '--data=/dev/null/x'),
  'workloads': ('--image_size=9', '--workload=mnist'),
}


def _bad_values(flag) -> dict | None:
  """Bad values of a flag, by kind; None if any text may be right."""
  if flag.name in ('coordinator', 'dataset'):
    return None
  if flag.boolean:
    return _BAD['true or false']
  # Flags whose words absl checks have no syntax.
  syntax = flag.parser.syntactic_help.split(' from ')[0]
  return _BAD.get(syntax, _BAD['a word'])


def _draw(module, name: str, draw: random.Random):
  """Kind of error, flags, and those of which the message has to name one."""
  dice = draw.random()
  if dice < 0.15:
    words = draw.choice(_TOGETHER[name]).split()
    return 'together', words, words[:1]
  if dice < 0.2:
    words = [draw.choice(('--no_such_flag', '--sed=1', '--=1', '--ünicode=1'))]
    return 'unknown', words, words
  own = flags.FLAGS.get_key_flags_for_module(module)
  pool = [flag for flag in own if _bad_values(flag)]
  words, wrong = [], set()
  for flag in draw.sample(pool, draw.choice((1, 1, 2))):
    values = _bad_values(flag)
    kind = draw.choice(list(values))
    default = flag.default
    if isinstance(default, list):
      default = ','.join(default)
    value = draw.choice(values[kind]).format(default=default)
    words.append(f'--{flag.name}={value}')
    wrong.add(kind)
  return ' and '.join(sorted(wrong)), words, words


def _run_here(check, words: list[str]) -> None:
  """Checks flags as the command does, and ends the process."""
  code = 0
  try:
    sys.argv = ['experiment', *words]
    launch(check)
  except SystemExit as end:
    code = end.code
    if isinstance(code, str):
      print(code, file=sys.stderr)
      code = 1
  except BaseException:
    traceback.print_exc()
    code = 2
  finally:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def _attempt(check, words: list[str]) -> tuple[int | None, str]:
  """The exit status, None after SECONDS, and the output of a process."""
  with tempfile.TemporaryFile(mode='w+', errors='replace') as file:
    child = os.fork()
    if not child:
      os.dup2(file.fileno(), 1)
      os.dup2(file.fileno(), 2)
      _run_here(check, words)
    end = time.monotonic() + SECONDS
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
      if time.monotonic() > end:
        os.kill(child, 9)
        os.waitpid(child, 0)
        break
      time.sleep(0.002)
    file.seek(0)
    code = os.waitstatus_to_exitcode(ended[1]) if ended[0] else None
    return code, file.read()


def _judge(code: int | None, output: str, named: list[str]) -> str:
  """`refused`, or what is wrong with the refusal."""
  if code is None:
    return 'hangs'
  if 'Traceback' in output:
    return 'traceback'
  if code != 1:
    return 'not refused' if code == 0 else f'exit status {code}'
  if os.listdir():
    return 'leaves files'
  lines = output.splitlines()
  if len(lines) != 1 or not lines[0].startswith('error: '):
    return 'no single line'
  names = [word.partition('=')[0] for word in named]
  return 'refused' if any(n in lines[0] for n in names) else 'not named'


def attack(name: str, count: int, seed: int) -> None:
  """Prints a line of JSON for each of `count` combinations."""
  module = importlib.import_module(f'experiments.{name}')
  # Imported once, before the forks.
  for workload in workloads.names():
    importlib.import_module(f'nemo_jax.workloads.{workload}')
  draw = random.Random(f'{name} {seed}')
  # JAX warns of forks; nothing has been computed yet.
  warnings.filterwarnings('ignore', 'os.fork', RuntimeWarning)
  with tempfile.TemporaryDirectory() as folder:
    os.chdir(folder)
    code, output = _attempt(module.check, [])
    verdict = 'not accepted' if code or output else 'accepted'
    print(json.dumps(['nothing', verdict, [], output]), flush=True)
    for _ in range(count):
      wrong, words, named = _draw(module, name, draw)
      code, output = _attempt(module.check, words)
      verdict = _judge(code, output, named)
      print(json.dumps([wrong, verdict, words, output]), flush=True)


def _start(name: str, count: int, seed: int) -> list:
  """Lines of `attack`, from a new process that has no JAX backend yet."""
  command = [sys.executable, '-m', 'benchmarks.flags', f'--experiment={name}']
  done = subprocess.run(
    [*command, f'--combinations={count}', f'--seed={seed}'],
    cwd=pathlib.Path(__file__).parent.parent,
    stdout=subprocess.PIPE,
    text=True,
    check=True,
  )
  return [json.loads(line) for line in done.stdout.splitlines()]


def main() -> None:
  """Attacks all experiments and prints counts by kind of error."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--combinations', type=int, default=500)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--experiment', choices=EXPERIMENTS)
  given = parser.parse_args()
  if given.experiment:
    attack(given.experiment, given.combinations, given.seed)
    return
  share = -(-given.combinations // len(EXPERIMENTS))
  with ThreadPoolExecutor(os.cpu_count()) as pool:
    found = list(
      pool.map(lambda name: _start(name, share, given.seed), EXPERIMENTS)
    )
  counts = collections.Counter()
  for name, rows in zip(EXPERIMENTS, found, strict=True):
    for wrong, verdict, words, output in rows:
      counts[wrong, verdict] += 1
      if verdict not in ('refused', 'accepted'):
        print(f'{verdict}: {name} {ascii(words)[:300]}: {ascii(output)[-600:]}')
  for (wrong, verdict), count in sorted(counts.items()):
    print(f'{count:5}  {verdict:12}  {wrong}')
  clean = sum(n for (_, verdict), n in counts.items() if verdict == 'refused')
  wrong = counts.total() - counts['nothing', 'accepted']
  print(f'{clean} of {wrong} combinations are refused in one line')
  sys.exit(clean < wrong)


if __name__ == '__main__':
  main()
