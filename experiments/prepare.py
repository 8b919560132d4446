"""Prepares a TFDS data set so that it is read without TensorFlow.

  python -m experiments.prepare --tars=FOLDER --data=OTHER

writes ImageNet from ILSVRC2012_img_train.tar, and ILSVRC2012_img_val.tar if it
is there. With --dataset=imagenette, or any other of TFDS, the data is
downloaded. This alone needs TensorFlow: pip install 'nemo_jax[tensorflow]'.
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
define.path('tars', None, 'folder with what a user has to download')
define.path('data', None, "where to write; TFDS's default folder if absent")


def check() -> None:
  """Raises `InputError` for flags that cannot be used."""
  own = define.own(__name__)
  # A name, with its variant, version and collection where it has them.
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
  """The experiment."""
  check()
  own = define.own(__name__)
  folder = data.prepare(own.dataset, own.data, own.tars)
  print(f'prepared {folder}')


def main() -> None:
  """The command."""
  launch(run)


if __name__ == '__main__':
  main()
