"""What life brings: streams of experience, and their evaluation."""

from collections.abc import Mapping
from typing import Any

from sleep_jax import config
from sleep_jax.config import registry
from sleep_jax.tasks import base


def build(name: str, settings: Mapping[str, Any], seed: int) -> base.Task:
  """The task called `name` (see `registry.find`), with its own settings.

  Raises:
    ConfigError: if there is no such task or setting.
  """
  cls, cfg = registry.find(name, 'sleep_jax.tasks', 'task.name')
  return cls(config.from_mapping(cfg, settings, 'task'), seed)
