"""Files that are shipped with the package, in `sleep_jax/assets`."""

import importlib.resources
import pathlib

_ASSETS = pathlib.PurePosixPath('sleep_jax/assets')


def folder() -> pathlib.Path:
  """The folder of the installed package's files."""
  return pathlib.Path(str(importlib.resources.files('sleep_jax') / 'assets'))


def find(name: str) -> pathlib.Path:
  """The file of a path in a config.

  Args:
    name: a path; one under `sleep_jax/assets` is that of the installed package
      where the working directory has no such file.
  """
  path = pathlib.Path(name)
  if path.exists() or not path.is_relative_to(_ASSETS):
    return path
  shipped = folder() / path.relative_to(_ASSETS)
  return shipped if shipped.exists() else path
