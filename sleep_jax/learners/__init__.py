"""Ways to live, by name."""

import dataclasses
from typing import Any

from sleep_jax import config
from sleep_jax.config import registry
from sleep_jax.learners import base

OWN_SECTION = 'learner_config'


def config_of(cls: type, settings: config.Settings) -> Any:
  """A learner's config from an experiment's sections; absent ones default."""
  sections: dict[str, Any] = dict(settings)
  own: dict[str, Any] = dict(sections.get(OWN_SECTION, {}))
  for field in dataclasses.fields(cls):
    if field.name not in sections or not isinstance(field.type, type):
      continue
    if dataclasses.is_dataclass(field.type):
      section = sections[field.name]
      own[field.name] = config.from_mapping(field.type, section, field.name)
  return config.from_mapping(cls, own, OWN_SECTION)


def build(
  name: str, settings: config.Settings, setup: base.Setup
) -> base.Learner:
  """The learner called `name` (see `registry.find`).

  Args:
    name: of the learner.
    settings: the sections of an experiment's config.
    setup: what it is made of.

  Raises:
    ConfigError: if there is none of that name, or a setting cannot work.
  """
  cls, cfg = registry.find(name, 'sleep_jax.learners', 'learner')
  learner = cls(config_of(cfg, settings), setup)
  learner.check()
  return learner
