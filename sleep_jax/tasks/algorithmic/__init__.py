"""Generated problems that are read window by window."""

from collections.abc import Mapping
from typing import Any

from sleep_jax import config
from sleep_jax.tasks.algorithmic import base
from sleep_jax.tasks.algorithmic import depo
from sleep_jax.tasks.algorithmic import rule110
from sleep_jax.tasks.algorithmic import symbolic

_TASKS = {
  'depo': (depo.Depo, depo.DepoConfig),
  'rule110': (rule110.Rule110, rule110.Rule110Config),
  'symbolic': (symbolic.Symbolic, symbolic.SymbolicConfig),
}


def build(name: str, settings: Mapping[str, Any]) -> base.WindowTask:
  """The problem called `name`, with its own settings.

  Raises:
    ConfigError: if there is no such problem or setting, or if it cannot work.
  """
  cls, cfg = config.lookup(name, _TASKS, 'puzzle.name')
  return cls(config.from_mapping(cfg, settings, 'puzzle'))
