"""Sources of labelled images: what they hand out for each role."""

import pytest

from nemo_jax import data
from tests.pictures import WNIDS, class_folders, read, refused


def test_imagenet_has_a_thousand_classes_in_order():
  classes = data.imagenet_classes()
  assert list(classes) == sorted(classes)
  assert list(classes.values()) == list(range(1000))
  assert {name: classes[name] for name in WNIDS} == WNIDS


@pytest.mark.parametrize(
  ('folders', 'role', 'chosen'),
  [
    (('train', 'val'), 'train', 'train'),
    (('train', 'val'), 'validation', 'val'),
    (('train', 'validation', 'val', 'test'), 'validation', 'validation'),
    (('train', 'test'), 'validation', 'test'),
    (('train',), 'validation', 'train'),
    (('val',), 'validation', 'val'),
  ],
)
def test_a_folder_for_each_role(tmp_path, folders, role, chosen):
  for name in folders:
    class_folders(tmp_path / name)
  keys = {e.key for e in read(tmp_path, role)}
  assert keys == {str(f) for f in (tmp_path / chosen).glob('*/*.JPEG')}


def test_tars_are_to_be_prepared(tmp_path):
  (tmp_path / 'ILSVRC2012_img_train.tar').write_bytes(b'')
  with refused(f'experiments.prepare --tars={tmp_path} --data=FOLDER'):
    data.open_source(str(tmp_path), 'train', 1000)


def test_places_that_are_nothing_of_the_kind(tmp_path):
  with refused(f'there is no {tmp_path}/nothing'):
    data.open_source(str(tmp_path / 'nothing'), 'train', 10)
  (tmp_path / 'file').write_text('')
  with refused('file is neither a folder nor an .npz'):
    data.open_source(str(tmp_path / 'file'), 'train', 10)
  class_folders(tmp_path / 'only' / 'val')
  with refused('only has no folder train'):
    data.open_source(str(tmp_path / 'only'), 'train', 1000)
