"""sleep_jax.harness.build."""

from typing import Any

import jax

from sleep_jax import config
from sleep_jax import learners
from sleep_jax import tasks
from sleep_jax.data import tokenizers
from sleep_jax.learners import base as learner_lib
from sleep_jax.learners import finetune
from sleep_jax.lifecycle import wake as wake_lib
from sleep_jax.lifecycle.consolidation import config as consolidation_config
from sleep_jax.lifecycle.dreaming import config as dreaming_config
from sleep_jax.lifecycle.recurrence import config as recurrence_config
from sleep_jax.metrics import costs as costs_lib
from sleep_jax.models import lora
from sleep_jax.models import memory as memory_lib
from sleep_jax.runtime import sharding
from sleep_jax.tasks import base as task_lib
from sleep_jax.weights import load as load_lib

Settings = dict[str, Any]

# Settings of how lives are run; what a life becomes does not depend on them.
_HOW_RUN = ('workers', 'writers', 'profile', 'mesh')

# Sections that only some experiments need.
_OPTIONAL = {
  'recurrence': recurrence_config.RecurrenceConfig,
  'lora': lora.LoraConfig,
  'trial': dreaming_config.TrialConfig,
  'dreaming': dreaming_config.DreamingConfig,
}


def arm_config(c: Settings, arm: str) -> Settings:
  """The config of one arm: the common one with the arm's changes put in.

  Raises:
    ConfigError: if an arm changes a section or setting that is not there.
  """
  arms = c['arms']
  change = dict(config.lookup(arm, arms, 'arm'))
  out = {k: v for k, v in c.items() if k != 'arms'}
  out['learner'] = change.pop('learner', arm)
  for section, values in change.items():
    if section not in out:
      raise config.ConfigError(
        f'arms.{arm}.{section}: there is no section {section!r} to change; '
        f'known are {", ".join(sorted(out))}.'
      )
    out[section] = {**out[section], **values}
  return out


def build(
  c: Settings, seed: int
) -> tuple[task_lib.Task, learner_lib.Learner, costs_lib.CostTracker]:
  """Everything that one life needs; every bad setting is refused here."""
  given = dict(c['task'])
  task = tasks.build(given.pop('name'), given, seed)
  model = config.ModelConfig.from_mapping(c['model'])
  tokenizers.check_fits(task.tokenizer, model.vocab)
  ledger = costs_lib.CostTracker(model, given['length'])
  setup = learner_lib.Setup(
    model=model,
    params=sharding.shard_params(
      load_lib.load(c['base'], model, given.get('data_dir'))
    ),
    tokenizer=task.tokenizer,
    wake=config.from_mapping(wake_lib.WakeConfig, c['wake'], 'wake'),
    sleep=config.from_mapping(
      consolidation_config.SeedingConfig, c['sleep'], 'sleep'
    ),
    finetune=config.from_mapping(
      finetune.FinetuneConfig, c['finetune'], 'finetune'
    ),
    costs=ledger,
    format=getattr(task, 'reader', None),
    **{
      name: config.from_mapping(cls, c[name], name)
      for name, cls in _OPTIONAL.items()
      if name in c
    },
  )
  check_slots(setup, task.episodes)
  check_mesh(setup)
  return task, learners.build(c['learner'], setup), ledger


def check_slots(setup: learner_lib.Setup, nights: int) -> None:
  """Refuses, before the first day, a life that would run out of slots."""
  levels = setup.model.levels
  nights += bool(setup.format and setup.dreaming.study_night)
  for i, level in enumerate(levels[:-1]):
    slots = levels[i + 1].slots
    # Whatever this level's own sleep prunes is free again.
    frees = bool(levels[i + 1].sleep_every)
    limited = setup.sleep.slot_policy == 'error' and setup.sleep.expand
    if level.sleep_every and limited and not frees and nights > slots:
      raise config.ConfigError(
        f'{nights} nights need {nights} slots, but model.levels[{i + 1}].'
        f'slots={slots} and sleep.slot_policy=error; raise slots, or set '
        'sleep.slot_policy=merge or recycle.'
      )


def check_mesh(setup: learner_lib.Setup) -> None:
  """Refuses, before the first day, what does not divide over the mesh."""
  how = setup.sleep
  sharding.check_rows(
    {
      'wake.lanes': setup.wake.batch,
      'finetune.batch': setup.finetune.batch,
      'sleep.batch': how.batch,
      'half of sleep.dreams': how.dreams // 2,
      'sleep.prefixes x sleep.group': how.prefixes * how.group,
      'sleep.rollout_groups x sleep.group': how.rollout_groups * how.group,
    }
  )
  sharding.check_leaves(
    jax.eval_shape(lambda: memory_lib.init_memory(setup.model))
  )


def config_identity(c: Settings) -> Settings:
  """The settings that make a life what it is, without how it is run."""
  return {k: v for k, v in c.items() if k not in _HOW_RUN}
