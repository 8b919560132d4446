"""Plug-ins are found by name, by module and by path."""

import importlib
import sys

import pytest

from nemo_jax.core import plugins
from nemo_jax.core.types import InputError


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """Where modules are imported from; what was imported is forgotten after."""
  monkeypatch.syspath_prepend(tmp_path)
  before = set(sys.modules)
  yield tmp_path
  for name in set(sys.modules) - before:
    del sys.modules[name]


@pytest.fixture
def package(folder):
  """A package with two plug-ins, and a file that is none."""
  inside = folder / 'sweets'
  inside.mkdir()
  (inside / '__init__.py').touch()
  (inside / '_shared.py').write_text('SUGAR = 1\n')
  (inside / 'toffee.py').write_text("COLOUR = 'brown'\n")
  (inside / 'fudge.py').write_text("COLOUR = 'beige'\n")
  importlib.invalidate_caches()
  return importlib.import_module('sweets')


def find(package, name, needed=('COLOUR',)):
  return plugins.find(package, 'sweet', str(name), needed)


def refused(package, name, needed=('COLOUR',)) -> str:
  """The message, which is one line."""
  with pytest.raises(InputError) as caught:
    find(package, name, needed)
  message = str(caught.value)
  assert '\n' not in message
  assert str(name) in message
  return message


def test_files_of_a_package_are_plug_ins_but_for_those_that_are_hidden(package):
  assert plugins.names(package) == ['fudge', 'toffee']
  assert find(package, 'toffee').COLOUR == 'brown'
  assert find(package, 'toffee') is sys.modules['sweets.toffee']


@pytest.mark.parametrize('name', ['liquorice', '', '_shared', 'toffee/', 'py'])
def test_an_unknown_name_lists_the_known_and_what_else_there_is(package, name):
  message = refused(package, name)
  assert f'unknown sweet {name!r}; the choices are fudge, toffee' in message
  assert 'of your own' in message


def test_what_a_file_has_to_define_is_named(package):
  message = refused(package, 'toffee', ('COLOUR', 'TASTE', 'PRICE'))
  assert message == (
    "sweet 'toffee' has no TASTE; a file of this kind defines COLOUR, TASTE, "
    'PRICE'
  )


def test_a_path_is_a_file_of_ones_own(package, folder):
  path = folder / 'elsewhere' / 'nougat.py'
  path.parent.mkdir()
  path.write_text("COLOUR = 'white'\n")
  module = find(package, path)
  assert module.COLOUR == 'white'
  # It is run once.
  assert find(package, path) is module
  assert refused(package, path, ('TASTE',)).endswith('defines TASTE')


def test_a_path_is_that_of_the_working_folder_or_of_home(
  package, folder, monkeypatch
):
  monkeypatch.chdir(folder)
  monkeypatch.setenv('HOME', str(folder))
  (folder / 'nougat.py').write_text("COLOUR = 'white'\n")
  module = find(package, 'nougat.py')
  assert module.COLOUR == 'white'
  for name in ('./nougat.py', '~/nougat.py', folder / 'nougat.py'):
    assert find(package, name) is module


def test_files_of_one_name_are_apart(package, folder):
  colours = []
  for colour in ('white', 'pink'):
    (folder / colour).mkdir()
    path = folder / colour / 'toffee.py'
    path.write_text(f'COLOUR = {colour!r}\n')
    colours.append(find(package, path).COLOUR)
  colours.append(find(package, 'toffee').COLOUR)
  assert colours == ['white', 'pink', 'brown']


def test_a_file_of_ones_own_may_look_itself_up(package, folder):
  """As dataclasses do where annotations are strings."""
  path = folder / 'nougat.py'
  path.write_text(
    'from __future__ import annotations\n'
    'import dataclasses\n'
    '@dataclasses.dataclass\n'
    'class Sweet:\n'
    '  colour: str\n'
    "COLOUR = Sweet('white').colour\n"
  )
  assert find(package, path).COLOUR == 'white'


def test_a_module_with_a_dot_is_of_ones_own(package, folder):
  (folder / 'mine').mkdir()
  (folder / 'mine' / '__init__.py').touch()
  (folder / 'mine' / 'nougat.py').write_text("COLOUR = 'white'\n")
  assert find(package, 'mine.nougat').COLOUR == 'white'
  assert 'No module named' in refused(package, 'mine.praline')


@pytest.mark.parametrize(
  ('text', 'words'),
  [
    ('import no_such_thing', 'ModuleNotFoundError: No module named'),
    ('COLOUR = ', 'SyntaxError: invalid syntax'),
    ('raise ValueError("so\\nmuch\\nmore")', 'ValueError: so'),
    ('raise ValueError', 'ValueError: ValueError'),
    ('assert False', 'AssertionError'),
  ],
)
def test_what_fails_while_it_is_imported_says_so_in_one_line(
  package, folder, text, words
):
  path = folder / 'nougat.py'
  path.write_text(text)
  message = refused(package, path)
  assert f'sweet {str(path)!r} cannot be imported: {words}' in message
  # Once it is mended it is found.
  path.write_text("COLOUR = 'white'  # and no longer what it was\n")
  assert find(package, path).COLOUR == 'white'


def test_a_file_that_is_not_there_cannot_be_imported(package, folder):
  assert 'FileNotFoundError' in refused(package, folder / 'nougat.py')
  (folder / 'folder.py').mkdir()
  assert 'cannot be imported' in refused(package, folder / 'folder.py')


@pytest.mark.parametrize(
  ('name', 'own', 'short'),
  [
    ('toffee', False, 'toffee'),
    ('mine.nougat', True, 'nougat'),
    ('nougat.py', True, 'nougat'),
    ('./of/my/own/nougat.py', True, 'nougat'),
    ('/home/me/v1.2/nougat.py', True, 'nougat'),
  ],
)
def test_the_short_name_is_that_without_where_it_is(name, own, short):
  assert plugins.is_own(name) == own
  assert plugins.short_name(name) == short


def test_files_of_the_users_own_have_a_digest_that_follows_their_content(
  tmp_path,
):
  file = tmp_path / 'nougat.py'
  file.write_text('SWEET = 1\n')
  words = ['toffee', f'{file}:SNES', 'mine.nougat']
  before = plugins.digests('species', words)
  assert list(before) == [f'species {file}']
  assert plugins.digests('species', words) == before
  file.write_text('SWEET = 2\n')
  assert plugins.digests('species', words) != before
