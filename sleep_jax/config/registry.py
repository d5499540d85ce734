"""Classes by name: those of a package here, of a plugin, or `module:Class`.

A class that can be named has a `name` and a `Config`, the dataclass of its
settings. Whoever adds one writes one file: nothing has to list it.
"""

import functools
import importlib
from importlib import metadata
import pkgutil
from typing import Any

from sleep_jax.config import base


@functools.cache
def _of_package(package: str) -> dict[str, type]:
  """The named classes of a package's modules, sub-packages included."""
  root = importlib.import_module(package)
  found = {}
  for info in pkgutil.walk_packages(root.__path__, f'{package}.'):
    module = importlib.import_module(info.name)
    for value in vars(module).values():
      own = isinstance(value, type) and value.__module__ == info.name
      if own and isinstance(vars(value).get('name'), str):
        found[vars(value)['name']] = value
  return found


def _of_plugins(group: str) -> dict[str, metadata.EntryPoint]:
  return {e.name: e for e in metadata.entry_points(group=group)}


def names(package: str) -> list[str]:
  """What `find` knows by name, `module:Class` aside."""
  return sorted({*_of_package(package), *_of_plugins(package)})


def find(name: str, package: str, where: str) -> tuple[type[Any], type[Any]]:
  """The class called `name`, and the dataclass of its settings.

  Args:
    name: the `name` of a class in `package`; that of an entry point in the
      group of the same name (`sleep_jax.tasks`, say); or `module:Class`.
    package: where the library's own classes are.
    where: the setting that gave the name, for the message.

  Raises:
    ConfigError: if there is no such class, or it has no `Config`.
  """
  if ':' in name:
    module, _, attribute = name.partition(':')
    try:
      cls = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as e:
      raise base.ConfigError(
        f'{where}={name!r} cannot be imported: {e}. Give module:Class, with '
        'the module on the Python path.'
      ) from e
  elif name in (own := _of_package(package)):
    cls = own[name]
  else:
    plugins = _of_plugins(package)
    known: dict[str, Any] = dict.fromkeys(own) | plugins
    cls = base.lookup(name, known, where).load()
  if not hasattr(cls, 'Config'):
    raise base.ConfigError(
      f'{where}={name!r}: {cls.__name__} has no Config; set it to the '
      'dataclass of its settings.'
    )
  return cls, cls.Config
