"""Prepares a TFDS data set so that it is read without TensorFlow.

  python -m experiments.prepare --tars=FOLDER --data=OTHER

writes ImageNet from ILSVRC2012_img_train.tar, and ILSVRC2012_img_val.tar if it
is there. With --dataset=imagenette, or any other of TFDS, the data is
downloaded. This alone needs TensorFlow: pip install 'nemo_jax[tensorflow]'.
"""

from absl import flags

from experiments.launch import launch
from nemo_jax import data

FLAGS = flags.FLAGS

flags.DEFINE_string('dataset', 'imagenet2012', 'name in the catalogue of TFDS')
flags.DEFINE_string('tars', None, 'folder with what a user has to download')
flags.DEFINE_string(
  'data', None, "where to write; TFDS's default folder if absent"
)


def run() -> None:
  """The experiment."""
  folder = data.prepare(FLAGS.dataset, FLAGS.data, FLAGS.tars)
  print(f'prepared {folder}')


if __name__ == '__main__':
  launch(run)
