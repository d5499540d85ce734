"""Dataclasses from mappings, with errors that name the invalid setting."""

from collections.abc import Mapping
import dataclasses
from typing import Any, TypeVar, cast

import ml_collections

_T = TypeVar('_T')
# A section of an experiment's config. A ConfigDict is no Mapping to Python.
Settings = Mapping[str, Any] | ml_collections.ConfigDict


class ConfigError(ValueError):
  """An invalid setting; the message names it and what to do."""


def from_mapping(cls: type[_T], values: Settings, where: str) -> _T:
  """Builds dataclass `cls`, naming any key that it does not have.

  Args:
    cls: a dataclass of this package.
    values: its fields; absent ones keep their defaults.
    where: the config path, for the message (`model.levels[0]`).

  Raises:
    ConfigError: for an unknown key.
  """
  known = {f.name for f in dataclasses.fields(cast(Any, cls))}
  if unknown := sorted(set(values) - known):
    raise ConfigError(
      f'{where}: unknown setting {unknown[0]!r}; known are '
      f'{", ".join(sorted(known))}.'
    )
  # JSON has lists where a config has tuples.
  return cls(
    **{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
  )


def lookup(value: str, options: Mapping[str, _T], where: str) -> _T:
  """`options[value]`.

  Raises:
    ConfigError: listing the options, if `value` is none of them.
  """
  if value not in options:
    raise ConfigError(
      f'{where}={value!r} is unknown; choose one of '
      f'{", ".join(sorted(options))}.'
    )
  return options[value]
