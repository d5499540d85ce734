"""What configs share."""

import dataclasses
from typing import Any, TypeAlias

import ml_collections

from sleep_jax import config
from sleep_jax.learners import finetune
from sleep_jax.lifecycle.recurrence import config as recurrence_config
from sleep_jax.runtime import sharding
from sleep_jax.tasks import corpus as corpus_lib

# An ml_collections.ConfigDict, of an experiment or of a section. The type of an
# attribute is the experiment's; by the stubs it is a union of all that can be.
Config: TypeAlias = Any

_EVALS = 10  # Episodes of a pretraining, each with an evaluation.
# SEAL's dreaming about ARC, but for the rate.
ARC_DREAMING = dict(
  dreams=60,
  temperature=0.8,
  keep=11,
  keep_random=4,
  learn_from='all',
  epochs=12,
  batch=5,
)
# Fast weights learn, and no night consolidates them.
WAKE_ONLY = dict(learner='sleep', sleep=dict(consolidate=False))
# Table 3 of the Sleep paper, but for four levels.
KNOWLEDGE_ARMS: dict[str, dict[str, Any]] = {
  'frozen': {},
  'icl': {},
  'finetune_passage': {},
  'ttt': {},
  'seal': {},
  'sleep': {},
  'no_selection': dict(learner='sleep', dreaming=dict(importance='random')),
  'no_random_expert': dict(learner='sleep', dreaming=dict(random_expert=0.0)),
  'no_dreaming': dict(
    learner='sleep', dreaming=dict(enabled=False, study_night=True)
  ),
}


def seal_reads_day(rate: float) -> dict[str, Any]:
  """The arm of a seal that has read what `sleep` reads, at this rate."""
  return dict(
    learner='seal',
    learner_config=dict(reads_day=True),
    finetune=dict(learning_rate=rate),
  )


def settings(cls: type, **changes) -> Config:
  """All fields of a typed config, so that each can be overridden by flag."""
  return ml_collections.ConfigDict(dataclasses.asdict(cls(**changes)))


def experiment(name: str) -> Config:
  """How lives are run; the result of a life does not depend on it."""
  c = ml_collections.ConfigDict()
  c.name = name
  c.workers = 2  # Lives at a time.
  c.writers = ()  # Beside JSON lines and TensorBoard: wandb, trackio.
  # Devices by mesh axis; all 1 is no mesh.
  c.mesh = ml_collections.ConfigDict(dict.fromkeys(sharding.MESH_AXES, 1))
  c.profile = ml_collections.ConfigDict(dict(steps=''))  # Such as 10:15.
  c.export = ''  # An .npz for the weights that the one life ends with.
  return c


def window_task(name: str, **changes) -> Config:
  """An experiment that trains a fresh hybrid through windows and passes.

  Args:
    name: of the task, and of the experiment.
    **changes: settings of the task.
  """
  c = experiment(name)
  c.base = ''
  c.learner = 'recurrent_training'  # Of every arm.
  c.task = ml_collections.ConfigDict(dict(name=name, **changes))
  c.recurrence = settings(recurrence_config.RecurrenceConfig, remat=False)
  c.training = settings(recurrence_config.TrainingConfig)
  c.seeds = (1, 2, 3)
  return c


def hybrid(dim: int, layers: int, hidden: int, **changes) -> Config:
  """Attention and Gated DeltaNet in turn, one feed-forward level."""
  return ml_collections.ConfigDict(
    dict(
      dim=dim,
      layers=layers,
      heads=4,
      levels=(settings(config.LevelConfig, hidden=hidden),),
      mixers=('attention', 'gdn'),
      recurrent=settings(config.RecurrentConfig),
    )
    | changes
  )


def vary(c: Config, variant: str, **variants) -> None:
  """Makes `c` the named variant of its experiment; '' leaves it as it is."""
  if variant:
    c.name = f'{c.name}_{variant}'
    config.lookup(variant, variants, 'variant')(c)


def tune(
  c: Config, seed: int, trials: dict[str, dict[str, dict[str, Any]]]
) -> None:
  """Makes the arms trials of settings, as many for each arm, on one seed.

  Args:
    c: with its arms.
    seed: that no table has.
    trials: by arm, then by name, what a trial changes beside what its arm does.

  Raises:
    ValueError: if one arm is tried more often than another.
  """
  if len({len(of_arm) for of_arm in trials.values()}) > 1:
    raise ValueError(
      f'arms have {[len(x) for x in trials.values()]} trials; give all as many.'
    )
  arms = {}
  for arm, of_arm in trials.items():
    own: dict[str, Any] = {'learner': arm} | dict(c.arms[arm])
    for name, changes in of_arm.items():
      merged = {k: {**own.get(k, {}), **v} for k, v in changes.items()}
      arms[f'{arm}_{name}'] = own | merged
  c.seeds, c.arms, c.reference = (seed,), arms, next(iter(arms))


def corpus(
  name: str,
  model: Config,
  *,
  steps: int,
  batch: int = 32,
  learning_rate: float = 4e-3,
  **changes,
) -> Config:
  """An experiment that pretrains one base on a corpus, and exports it.

  Args:
    name: of the experiment, and of the file under sleep_jax/assets.
    model: a section.
    steps: of AdamW.
    batch: rows of a step.
    learning_rate: the highest, after a warm-up; then it decays to zero.
    **changes: settings of the task `corpus`.
  """
  c = pretraining(name, model, rows=steps * batch // _EVALS, **changes)
  c.learner = 'sft'
  c.finetune = settings(
    finetune.FinetuneConfig,
    batch=batch,
    learning_rate=learning_rate,
    weight_decay=0.01,
    warmup_cosine_steps=steps,
  )
  return c


def pretraining(name: str, model: Config, **changes) -> Config:
  """What `corpus` and the recipe of a hybrid base share.

  Args:
    name: of the experiment, and of the file under sleep_jax/assets.
    model: a section.
    **changes: settings of the task `corpus`.
  """
  c = experiment(name)
  c.seeds = (0,)
  c.workers = 1
  c.reference = 'base'
  c.arms = {'base': {}}
  c.base = ''
  c.export = f'sleep_jax/assets/{name}.npz'
  c.model = model
  c.task = settings(corpus_lib.CorpusConfig, episodes=_EVALS, **changes)
  c.task.name = 'corpus'
  return c
