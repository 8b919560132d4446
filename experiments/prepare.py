"""Prepares a TFDS data set so that it is read without TensorFlow.

  python -m experiments.prepare --tars=FOLDER --data=OTHER

writes ImageNet from ILSVRC2012_img_train.tar, and ILSVRC2012_img_val.tar if it
is there. With --dataset=imagenette, or any other of TFDS, the data is
downloaded. This alone needs TensorFlow: pip install 'nemo_jax[tensorflow]'.
"""

import os
import re

from absl import flags

from experiments import define
from experiments.launch import launch
from nemo_jax import data, runs
from nemo_jax.core.types import InputError

FLAGS = flags.FLAGS

flags.DEFINE_string('dataset', 'imagenet2012', 'name in the catalogue of TFDS')
define.path('tars', None, 'folder with what a user has to download')
define.path('data', None, "where to write; TFDS's default folder if absent")


def check() -> None:
  """Raises `InputError` for flags that cannot be used."""
  # A name, with its variant, version and collection where it has them.
  if not re.fullmatch(r'[A-Za-z0-9_.:/*+-]+', FLAGS.dataset):
    raise InputError(
      f'--dataset={FLAGS.dataset} is no name in the catalogue of TFDS'
    )
  if FLAGS.tars and not os.path.isdir(FLAGS.tars):
    raise InputError(f'--tars={FLAGS.tars}: there is no such folder')
  if FLAGS.data:
    with define.named('data'):
      runs.check_folder(FLAGS.data)


def run() -> None:
  """The experiment."""
  check()
  folder = data.prepare(FLAGS.dataset, FLAGS.data, FLAGS.tars)
  print(f'prepared {folder}')


if __name__ == '__main__':
  launch(run)
