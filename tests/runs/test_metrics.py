"""metrics.jsonl: read whatever is in it, and never wrong numbers."""

import json
import pathlib
import tempfile
import warnings

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from nemo_jax import InputError
from nemo_jax.runs import metrics

LINES = [
  {'generation': g, 'hypervolume': 0.1 * g, 'utility': [0.5, 0.25]}
  for g in (1, 2, 3)
]


@pytest.fixture(scope='module')
def content(tmp_path_factory):
  folder = tmp_path_factory.mktemp('metrics')
  for line in LINES:
    metrics.append_metrics(folder, line)
  assert metrics.read_metrics(folder) == LINES
  return (folder / 'metrics.jsonl').read_bytes()


def read(content: bytes):
  """The lines, and the warnings."""
  with (
    tempfile.TemporaryDirectory() as folder,
    warnings.catch_warnings(record=True) as said,
  ):
    warnings.simplefilter('always')
    (pathlib.Path(folder) / 'metrics.jsonl').write_bytes(content)
    return metrics.read_metrics(folder), said


@hypothesis.settings(max_examples=300)
@hypothesis.given(data=st.data())
def test_a_changed_byte_costs_its_line_at_most(content, data):
  place = data.draw(st.integers(0, len(content) - 1))
  hurt = bytearray(content)
  hurt[place] ^= data.draw(st.integers(1, 255))
  found, said = read(bytes(hurt))
  # The name of the digest may have been hit, which costs nothing.
  found = [{k: x for k, x in m.items() if k in LINES[0]} for m in found]
  assert all(line in LINES for line in found)
  assert len(found) >= 1
  assert len(found) >= 2 or hurt.count(b'\n') < 3
  assert len(said) <= 1
  assert len(found) == 3 or said


@hypothesis.given(
  st.one_of(
    st.binary(max_size=80),
    st.lists(
      st.sampled_from(
        [
          b'{"generation": 1}',
          b'{"generation": "1"}',
          b'{"generation": true}',
          b'{"generation": 1.5}',
          b'{"generation": NaN}',
          b'{"generation": 1, "x": Infinity}',
          b'{"gener\xffation": 2}',
          b'[' * 100_000,
          b'{"generation": ' + b'9' * 5000 + b'}',
          b'null',
          b'',
        ]
      )
    ).map(b'\n'.join),
  )
)
def test_no_content_is_an_error(content):
  for line in read(content)[0]:
    assert line['generation'] in (1, *range(10))
    json.dumps(line, allow_nan=False)


def test_lines_of_older_versions_are_read():
  found, said = read(b'{"generation": 1, "x": 2.5}\n{"generation": 2}')
  assert found == [{'generation': 1, 'x': 2.5}, {'generation': 2}]
  assert not said


def test_one_warning_names_the_file_and_counts(content):
  found, said = read(b'{"generation": 0\n\xff\xfe\n' + content)
  assert found == LINES
  (warning,) = said
  assert 'metrics.jsonl is damaged: of 5 lines 2 left out' in str(
    warning.message
  )


def test_rewinding_keeps_bytes_and_forgets_what_is_later(content, tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_bytes(content)
  metrics.rewind_metrics(tmp_path, 3)
  assert path.read_bytes() == content
  metrics.rewind_metrics(tmp_path, 2)
  assert path.read_bytes() == b''.join(content.splitlines(True)[:2])
  # What a kill or a full disk cuts off is taken away.
  path.write_bytes(content[:-20])
  with pytest.warns(UserWarning, match='of 3 lines 1 left out'):
    metrics.rewind_metrics(tmp_path, 3)
  metrics.append_metrics(tmp_path, LINES[2])
  assert path.read_bytes() == content


def test_rewinding_what_is_as_it_should_be_writes_nothing(content, tmp_path):
  (tmp_path / 'metrics.jsonl').write_bytes(content)
  before = (tmp_path / 'metrics.jsonl').stat()
  metrics.rewind_metrics(tmp_path, 3)
  assert (tmp_path / 'metrics.jsonl').stat() == before
  metrics.rewind_metrics(tmp_path / 'none', 0)
  assert not (tmp_path / 'none').exists()


def test_infinities_are_null(tmp_path):
  values = {'generation': 1, 'utility': np.asarray([1.0, np.inf, np.nan])}
  metrics.append_metrics(tmp_path, values)
  (line,) = metrics.read_metrics(tmp_path)
  assert line == {'generation': 1, 'utility': [1.0, None, None]}


def test_a_folder_in_its_place_is_named(tmp_path):
  (tmp_path / 'metrics.jsonl').mkdir()
  for use in (
    lambda: metrics.read_metrics(tmp_path),
    lambda: metrics.append_metrics(tmp_path, LINES[0]),
  ):
    with pytest.raises(InputError, match='cannot use .*metrics.jsonl: '):
      use()
