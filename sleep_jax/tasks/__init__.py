"""Tasks: streams of experience, and how a life is evaluated on them."""

import os
from typing import Any

from sleep_jax import config
from sleep_jax.config import registry
from sleep_jax.tasks import base

_BYTES_PER_TOKEN = 8  # An int32, and its float32 weight.


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
  cfg = config.from_mapping(cfg, settings, 'task')
  _check_memory(cfg)
  return cls(cfg, seed)


def _check_memory(cfg: Any) -> None:
  """Refuses a day whose tokens and weights alone exceed this machine's memory.

  Raises:
    ConfigError: naming rows and length, where the task has both.
  """
  if not (hasattr(cfg, 'rows') and hasattr(cfg, 'length')):
    return
  needed = cfg.rows * cfg.length * _BYTES_PER_TOKEN
  memory = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
  if needed > memory:
    raise config.ConfigError(
      f'task.rows={cfg.rows} of task.length={cfg.length} tokens need '
      f'{needed / 2**30:.3g} GiB, and this machine has '
      f'{memory / 2**30:.3g} GiB of memory; lower one of them.'
    )
