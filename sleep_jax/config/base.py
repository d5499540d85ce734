"""Dataclasses from mappings, with errors that name the invalid setting."""

from collections.abc import Mapping
import dataclasses
import math
import sys
import types
import typing
from typing import Annotated, Any, TypeVar, cast

import ml_collections

_T = TypeVar('_T')
# A section of an experiment's config. A ConfigDict is no Mapping to Python.
Settings = Mapping[str, Any] | ml_collections.ConfigDict


class ConfigError(ValueError):
  """An invalid setting; the message names it and what to do."""


@dataclasses.dataclass(frozen=True)
class Bounds:
  """What a number may be, both ends included; every number has a least."""

  least: float = 0.0
  most: float = sys.float_info.max


# Sizes and counts of arrays have 32 bits, as JAX's indices.
_LARGEST = 2**31 - 1


# Numbers that may not be 0, or not above 1. All others must be at least 0.
Count = Annotated[int, Bounds(least=1, most=_LARGEST)]
Positive = Annotated[float, Bounds(least=5e-324)]
Fraction = Annotated[float, Bounds(most=1.0)]
Margin = Annotated[float, Bounds(most=math.inf)]  # inf = whatever it is.
_NUMBERS: dict[type, tuple[type, ...]] = {int: (int,), float: (int, float)}


def check_value(hint: Any, value: Any, where: str) -> None:
  """Refuses a value that a field of this type cannot have.

  Args:
    hint: the field's type: a number, str, bool, an option of these and None, or
      a tuple; all other types are left to those who use them.
    value: what it is set to.
    where: the config path, for the message.

  Raises:
    ConfigError: for a value of another type, or a number out of bounds.
  """
  origin, args, bounds = typing.get_origin(hint), typing.get_args(hint), None
  if origin is Annotated:
    (hint, bounds), origin = args, None
  if origin in (typing.Union, types.UnionType):
    if value is not None:
      check_value(args[0], value, where)
  elif origin is tuple:
    if not isinstance(value, (tuple, list)):
      raise ConfigError(f'{where}={value!r} must be a sequence.')
    if args[-1] is not Ellipsis and len(value) != len(args):
      raise ConfigError(f'{where}={value!r} must have {len(args)} entries.')
    for i, entry in enumerate(value):
      check_value(args[0], entry, f'{where}[{i}]')
  elif hint in _NUMBERS:
    if not isinstance(value, _NUMBERS[hint]) or isinstance(value, bool):
      kind = 'a whole number' if hint is int else 'a number'
      raise ConfigError(f'{where}={value!r} must be {kind}.')
    default = Bounds(most=_LARGEST) if hint is int else Bounds()
    _check_bounds(value, bounds or default, where)
  elif hint in (str, bool) and not isinstance(value, hint):
    kind = 'a string' if hint is str else 'True or False'
    raise ConfigError(f'{where}={value!r} must be {kind}.')


def check_fields(section: Any, where: str) -> None:
  """`check_value` of every field of a dataclass that was built by hand."""
  for name, hint in typing.get_type_hints(
    type(section), include_extras=True
  ).items():
    check_value(hint, getattr(section, name), f'{where}.{name}')


def _check_bounds(value: float, bounds: Bounds, where: str) -> None:
  # Not math.isnan: a whole number may be too large for a float.
  if value != value or sys.float_info.max < abs(value) > bounds.most:
    raise ConfigError(f'{where}={value} must be a finite number.')
  if value < bounds.least:
    least = f'at least {bounds.least:g}'
    if 0 < bounds.least < 1:
      least = 'above 0'
    raise ConfigError(f'{where}={value} must be {least}.')
  if value > bounds.most:
    raise ConfigError(f'{where}={value} must be at most {bounds.most:.12g}.')


def check_mapping(values: Any, where: str) -> None:
  """Raises ConfigError if `values` is no section of settings."""
  if not isinstance(values, (Mapping, ml_collections.ConfigDict)):
    raise ConfigError(f'{where}={values!r} must be a section of settings.')


def from_mapping(cls: type[_T], values: Any, where: str) -> _T:
  """Builds dataclass `cls`, naming what it cannot be built of.

  Args:
    cls: a dataclass of this package.
    values: `Settings` of its fields; absent ones keep their defaults.
    where: the config path, for the message (`model.levels[0]`).

  Raises:
    ConfigError: for an unknown or a missing key, and for a value that
      `check_value` refuses.
  """
  check_mapping(values, where)
  fields = {f.name: f for f in dataclasses.fields(cast(Any, cls))}
  if unknown := sorted(set(values) - set(fields)):
    raise ConfigError(
      f'{where}: unknown setting {unknown[0]!r}; known are '
      f'{", ".join(sorted(fields))}.'
    )
  absent = dataclasses.MISSING
  for name, field in fields.items():
    if name not in values and field.default is field.default_factory is absent:
      raise ConfigError(f'{where}.{name} is missing; it has no default.')
  hints = typing.get_type_hints(cls, include_extras=True)
  for name, value in values.items():
    check_value(hints[name], value, f'{where}.{name}')
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
