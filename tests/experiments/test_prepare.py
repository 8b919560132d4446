"""Preparing TFDS data from tars."""

import io
import sys
import tarfile

import pytest

from nemo_jax import data
from nemo_jax.data import images
from tests.pictures import jpeg, need_tensorflow, read, refused


def write_tar(path, files):
  with tarfile.open(path, 'w') as tar:
    for name, content in files.items():
      entry = tarfile.TarInfo(name)
      entry.size = len(content)
      tar.addfile(entry, io.BytesIO(content))


def write_training_tar(folder):
  """ImageNet's, of one image in one class."""
  need_tensorflow()
  inner = folder / 'n01443537.tar'
  write_tar(inner, {'n01443537_7.JPEG': jpeg(7)})
  path = folder / 'ILSVRC2012_img_train.tar'
  write_tar(path, {inner.name: inner.read_bytes()})
  inner.unlink()


def validation_files(count):
  return {f'ILSVRC2012_val_{i:08}.JPEG': jpeg(i) for i in range(1, 1 + count)}


def test_both_tars_make_both_splits(tmp_path, monkeypatch):
  write_training_tar(tmp_path)
  write_tar(tmp_path / 'ILSVRC2012_img_val.tar', validation_files(3))
  monkeypatch.setattr(data.prepared, 'VALIDATION_COUNT', 3)
  out = tmp_path / 'out'
  folder = data.prepare('imagenet2012', str(out), str(tmp_path))
  assert folder == out / 'imagenet2012' / '5.1.0'
  (train,) = read(out, 'train')
  assert (train.label, train.content()) == (1, jpeg(7))
  found = {e.content(): e.label for e in read(out, 'validation')}
  # The first of the official list, n01751748, n09193705 and n02105855.
  assert found == {jpeg(1): 65, jpeg(2): 970, jpeg(3): 230}


def test_the_training_tar_is_enough(tmp_path):
  write_training_tar(tmp_path)
  data.prepare('imagenet2012', str(tmp_path / 'out'), str(tmp_path))
  one, other = (
    data.open_source(str(tmp_path / 'out'), role, 1000)
    for role in ('train', 'validation')
  )
  assert one.identity == other.identity
  assert [e.label for e in one.examples(0)] == [1]
  # All classes have a name, but one alone has an image.
  look = lambda example: (None, example.key)
  assert list(images.draw(one, 0, [1], 0, look))


@pytest.mark.parametrize(
  ('name', 'tars', 'words'),
  [
    ('no_such_data', {}, "TFDS has no data set 'no_such_data'"),
    ('imagenet2012', None, 'name their folder with --tars'),
    ('imagenet2012', {}, 'there is no .*/ILSVRC2012_img_train.tar'),
    ('imagenet2012', {'train': b'no tar'}, 'cannot prepare imagenet2012: '),
    (
      'imagenet2012',
      {'train': b'', 'val': b'no tar'},
      '/ILSVRC2012_img_val.tar',
    ),
    (
      'imagenet2012',
      {'train': b'', 'val': validation_files(3)},
      '_val.tar holds 3 images; .* 50,000 .* name it with --validation',
    ),
  ],
)
def test_what_cannot_be_prepared(tmp_path, name, tars, words):
  need_tensorflow()
  for part, content in (tars or {}).items():
    path = tmp_path / f'ILSVRC2012_img_{part}.tar'
    if isinstance(content, dict):
      write_tar(path, content)
    else:
      path.write_bytes(content)
  folder = None if tars is None else str(tmp_path)
  with refused(words):
    data.prepare(name, str(tmp_path / 'out'), folder)
  assert not list(tmp_path.rglob('dataset_info.json'))


def test_preparing_needs_tensorflow(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'tensorflow', None)
  with refused(r"'nemo_jax\[tensorflow]'"):
    data.prepare('imagenet2012', str(tmp_path), str(tmp_path))
