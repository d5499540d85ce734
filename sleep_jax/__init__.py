"""sleep_jax: continual learning of language models by wake and sleep, in JAX.

Importing `sleep_jax` is cheap: a public name is imported on its first use.

  load              a model by its name, as a Sleeper: wake, sleep, ask, dream,
                    save, export (docs/api.md)
  Plan, NightReport, NotTransferred   what a Sleeper is set to, and tells
  Model, Life       the pytrees of a model and of its life
  ModelConfig       the architecture, with its levels (LevelConfig)
  ConfigError       an invalid setting; its message names it and what to do
  learners, tasks   their registries: `learners.build`, `tasks.build`
  weights           weights from and to files: `weights.load`, `weights.convert`
  harness           one run: build, the loop over nights, resume, report
  consolidation, dreaming   the two phases of a night
  sampling, scoring generation and evaluation of text
  sharding, checkpoint      meshes, and checkpoints of a life

Everything else may change without notice.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from sleep_jax.api import Sleeper as Sleeper
  from sleep_jax.api import load as load
  from sleep_jax.plan import Plan as Plan
  from sleep_jax.reports import NightReport as NightReport
  from sleep_jax.reports import NotTransferred as NotTransferred

__version__ = '0.2.0'

# Public name -> module, and the attribute of it ('' for the module itself).
_PUBLIC = {
  'ConfigError': ('sleep_jax.config', 'ConfigError'),
  'LevelConfig': ('sleep_jax.config', 'LevelConfig'),
  'Life': ('sleep_jax.lifecycle.life', 'Life'),
  'NightReport': ('sleep_jax.reports', 'NightReport'),
  'NotTransferred': ('sleep_jax.reports', 'NotTransferred'),
  'Plan': ('sleep_jax.plan', 'Plan'),
  'Sleeper': ('sleep_jax.api', 'Sleeper'),
  'load': ('sleep_jax.api', 'load'),
  'Model': ('sleep_jax.models.model', 'Model'),
  'ModelConfig': ('sleep_jax.config', 'ModelConfig'),
  'checkpoint': ('sleep_jax.runtime.checkpoint', ''),
  'consolidation': ('sleep_jax.lifecycle.consolidation', ''),
  'dreaming': ('sleep_jax.lifecycle.dreaming', ''),
  'harness': ('sleep_jax.harness', ''),
  'learners': ('sleep_jax.learners', ''),
  'sampling': ('sleep_jax.inference.sampling', ''),
  'scoring': ('sleep_jax.inference.scoring', ''),
  'sharding': ('sleep_jax.runtime.sharding', ''),
  'tasks': ('sleep_jax.tasks', ''),
  'weights': ('sleep_jax.weights', ''),
}


def __getattr__(name: str) -> Any:
  """A public name, imported on its first use (PEP 562)."""
  if name not in _PUBLIC:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  module, attribute = _PUBLIC[name]
  value = importlib.import_module(module)
  return getattr(value, attribute) if attribute else value


def __dir__() -> list[str]:
  return sorted([*globals(), *_PUBLIC])
