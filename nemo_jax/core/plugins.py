"""Plug-ins by name: files of a package, or files of the user."""

import hashlib
import importlib
import importlib.util
import pathlib
import pkgutil
import sys
from collections.abc import Sequence
from types import ModuleType

from nemo_jax.core.types import InputError, first_line


def names(package: ModuleType) -> list[str]:
  """Sorted names of the plug-ins in a package, without those that begin `_`."""
  found = [module.name for module in pkgutil.iter_modules(package.__path__)]
  return sorted(name for name in found if not name.startswith('_'))


def is_own(name: str) -> bool:
  """Whether a name is a file or a module of the user."""
  return name.endswith('.py') or '.' in name


def short_name(name: str) -> str:
  """Name of a plug-in in results: of the file or module, without its path."""
  own = pathlib.PurePath(name).stem if name.endswith('.py') else name
  return own.rpartition('.')[2]


def digests(kind: str, words: Sequence[str]) -> dict[str, str]:
  """SHA-256 of the files of the user's own among some names.

  Args:
    kind: what they are called in messages, such as `species`.
    words: names; what is behind a colon is left out.
  """
  own = [word.partition(':')[0] for word in words]
  return {
    f'{kind} {name}': hashlib.sha256(
      pathlib.Path(name).expanduser().read_bytes()
    ).hexdigest()
    for name in own
    if name.endswith('.py')
  }


def find(
  package: ModuleType, kind: str, name: str, needed: Sequence[str]
) -> ModuleType:
  """The module of a plug-in.

  Args:
    package: with the plug-ins of this project.
    kind: of plug-in, for messages, such as `species`.
    name: of a file in the package; or of the user's plug-in, as the path of a
      file that ends in `.py` or a module with a dot, such as `mine.network`.
    needed: names that the module has to define.

  Raises:
    InputError: the name is unknown, the file cannot be imported, or it lacks a
      needed name.
  """
  if is_own(name):
    module = _import_own(kind, name)
  elif name in names(package):
    module = importlib.import_module(f'{package.__name__}.{name}')
  else:
    raise InputError(
      f'unknown {kind} {name!r}; the choices are {", ".join(names(package))}, '
      'and a file or module of your own'
    )
  missing = [
    attribute for attribute in needed if not hasattr(module, attribute)
  ]
  if missing:
    raise InputError(
      f'{kind} {name!r} has no {missing[0]}; a file of this kind defines '
      f'{", ".join(needed)}'
    )
  return module


def _import_own(kind: str, name: str) -> ModuleType:
  """Imports a file or module of the user; any error becomes `InputError`."""
  try:
    if not name.endswith('.py'):
      return importlib.import_module(name)
    path = pathlib.Path(name).expanduser().resolve()
    # The name depends on the path: files of one name are different modules.
    known = f'nemo_jax_plugin_{path.stem}_{abs(hash(str(path))):x}'
    if known in sys.modules:
      return sys.modules[known]
    spec = importlib.util.spec_from_file_location(known, path)
    if spec is None or spec.loader is None:
      raise ImportError(f'{path} is no Python file')
    module = importlib.util.module_from_spec(spec)
    sys.modules[known] = module
    try:
      spec.loader.exec_module(module)
    except BaseException:
      del sys.modules[known]
      raise
    return module
  except Exception as error:  # a user's file may raise anything
    raise InputError(
      f'{kind} {name!r} cannot be imported: {type(error).__name__}: '
      f'{first_line(error)}'
    ) from error
