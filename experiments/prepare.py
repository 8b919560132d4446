"""Prepares a TFDS data set in a form that is read without TensorFlow.

  python -m experiments.prepare --tars=FOLDER --data=OTHER

writes ImageNet from ILSVRC2012_img_train.tar, and ILSVRC2012_img_val.tar if it
is there. With --dataset=imagenette, or another data set of TFDS, the data are
downloaded. This command needs TensorFlow: pip install 'nemo_jax[tensorflow]'.
"""

import os
import re

from absl import flags as absl_flags

from experiments import define
from experiments.launch import launch
from nemo_jax import data, runs
from nemo_jax.core.types import InputError

absl_flags.DEFINE_string(
  'dataset', 'imagenet2012', 'name in the catalogue of TFDS'
)
define.path(
  'tars', None, 'folder with files that have to be downloaded by hand'
)
define.path(
  'data', None, "folder of the result; TFDS's default folder if absent"
)


def check() -> None:
  """Raises `InputError` for flags that cannot be used."""
  own = define.own(__name__)
  # A name, with variant, version and collection if it has them.
  if not re.fullmatch(r'[A-Za-z0-9_.:/*+-]+', own.dataset):
    raise InputError(
      f'--dataset={own.dataset} is no name in the catalogue of TFDS'
    )
  if own.tars and not os.path.isdir(own.tars):
    raise InputError(f'--tars={own.tars}: there is no such folder')
  if own.data:
    with define.named('data'):
      runs.check_folder(own.data)


def run() -> None:
  """Prepares the data set."""
  check()
  own = define.own(__name__)
  folder = data.prepare(own.dataset, own.data, own.tars)
  print(f'prepared {folder}')


def main() -> None:
  """The command."""
  launch(run)


if __name__ == '__main__':
  main()
