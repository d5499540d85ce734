"""A model's dimensions, from its base where a config does not give them.

A config then says what is its own alone: the levels, where they lie, and how
the model is run. What it does give must agree with the base
(`add_levels.add_levels`).
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import Any, cast

from sleep_jax import config

# A section with all of these describes a model by itself.
_DIMENSIONS = ('vocab', 'dim', 'layers', 'heads')
# Of a config, never of its base.
_OWN = ('levels', 'partition', 'partition_from')


def are_complete(model: config.Settings) -> bool:
  """Whether a section needs nothing of a base."""
  values: dict[str, Any] = dict(model)
  return (
    all(values.get(name) for name in _DIMENSIONS)
    and all(level.get('hidden') for level in values.get('levels', ()))
    and not _are_fractions(values.get('partition', ()))
  )


def complete(
  model: config.Settings, base: config.ModelConfig
) -> config.ModelConfig:
  """The model of a section, with what it lacks taken from the base.

  Without one of `vocab`, `dim`, `layers` and `heads` all settings that the
  section does not name are the base's, but for levels and their partition.
  A level of `hidden=0` is as wide as the base's MLP. A partition may be counts
  of layers, or fractions of them, which are rounded so that every level has a
  layer.

  Raises:
    ConfigError: if the partition cannot be.
  """
  values: dict[str, Any] = dict(model)
  if not all(values.get(name) for name in _DIMENSIONS):
    for field in dataclasses.fields(base):
      name = field.name
      lacks = (
        not values.get(name) if name in _DIMENSIONS else name not in values
      )
      if name not in _OWN and lacks:
        values[name] = getattr(base, name)
    if not values.get('levels'):
      values |= {name: getattr(base, name) for name in _OWN if name != 'levels'}
      values['levels'] = [dataclasses.asdict(x) for x in base.levels]
  width = base.levels[-1].hidden
  values['levels'] = [
    {**level, 'hidden': level.get('hidden') or width}
    for level in values['levels']
  ]
  partition = values.get('partition', ())
  if _are_fractions(partition):
    values['partition'] = counts(partition, values['layers'])
  return _from_mapping(values)


def counts(fractions: Sequence[float], layers: int) -> tuple[int, ...]:
  """Whole layers in these proportions: at least one each, `layers` in all.

  Raises:
    ConfigError: if the fractions are not positive with sum 1, or more than
      there are layers.
  """
  if min(fractions) <= 0 or not math.isclose(sum(fractions), 1, abs_tol=1e-3):
    raise config.ConfigError(
      f'model.partition={tuple(fractions)}: fractions of the layers must be '
      'positive and have the sum 1; or give whole numbers of layers.'
    )
  if len(fractions) > layers:
    raise config.ConfigError(
      f'model.partition={tuple(fractions)} has {len(fractions)} parts, and '
      f'the base {layers} layers; use fewer levels.'
    )
  out = [max(1, math.floor(f * layers)) for f in fractions]
  while sum(out) != layers:
    missing = 1 if sum(out) < layers else -1
    # The level that is furthest from its fraction, among those that may give.
    gaps = [missing * (f * layers - n) for f, n in zip(fractions, out)]
    able = [i for i, n in enumerate(out) if n + missing >= 1]
    out[max(able, key=lambda i: gaps[i])] += missing
  return tuple(out)


def _are_fractions(partition: Sequence[float]) -> bool:
  return any(isinstance(part, float) for part in partition)


def _from_mapping(values: Mapping[str, Any]) -> config.ModelConfig:
  """`ModelConfig.from_mapping`, of values that may be typed already."""

  def plain(value: Any) -> Any:
    if not dataclasses.is_dataclass(value):
      return value
    return dataclasses.asdict(cast(Any, value))

  return config.ModelConfig.from_mapping(
    {k: plain(v) for k, v in values.items()}
  )
