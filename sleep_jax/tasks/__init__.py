"""Tasks: streams of experience, and how a life is evaluated on them."""

from sleep_jax import config
from sleep_jax.config import registry
from sleep_jax.tasks import base


def build(name: str, settings: config.Settings, seed: int) -> base.Task:
  """The task called `name`.

  Args:
    name: see `registry.find`: the `name` of a class in this package or of an
      entry point in the group `sleep_jax.tasks`, or `module:Class`.
    settings: fields of the task's `Config`; absent ones keep their defaults.
    seed: of the task's random draws.

  Raises:
    ConfigError: if there is no such task or setting, or if it cannot work.
  """
  cls, cfg = registry.find(name, 'sleep_jax.tasks', 'task.name')
  return cls(config.from_mapping(cfg, settings, 'task'), seed)
