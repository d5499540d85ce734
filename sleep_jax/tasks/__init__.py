"""What life brings: streams of experience, and exams over them."""

from collections.abc import Mapping
from typing import Any

from sleep_jax import config
from sleep_jax.tasks import arc
from sleep_jax.tasks import book
from sleep_jax.tasks import bulletins
from sleep_jax.tasks import class_incremental
from sleep_jax.tasks import facts
from sleep_jax.tasks import squad
from sleep_jax.tasks import task

_TASKS = {
  'arc_few_shot': (arc.Arc, arc.ArcConfig),
  'book': (book.Book, book.BookConfig),
  'bulletins': (bulletins.Bulletins, bulletins.BulletinsConfig),
  'facts': (facts.Facts, facts.FactsConfig),
  'knowledge_incorporation': (squad.Squad, squad.SquadConfig),
  'class_incremental': (
    class_incremental.ClassIncremental,
    class_incremental.ClassIncrementalConfig,
  ),
}


def build(name: str, settings: Mapping[str, Any], seed: int) -> task.Task:
  """The task called `name`, with its own settings.

  Raises:
    ConfigError: if there is no such task or setting.
  """
  cls, cfg = config.choose(name, _TASKS, 'task.name')
  return cls(config.from_mapping(cfg, settings, 'task'), seed)
