"""Baselines that study: finetune_passage, ttt and seal (SEAL, 2506.10943).

They differ from `sleep` in what they train on before they are asked, and read
nothing while awake, but for `seal` with `learner_config.reads_day`.
"""

import dataclasses
from typing import ClassVar

import jax

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.data import contexts
from sleep_jax.data import experience as experience_lib
from sleep_jax.learners import base
from sleep_jax.learners import finetune as finetune_lib
from sleep_jax.learners import frozen
from sleep_jax.lifecycle import life as life_lib
from sleep_jax.lifecycle.consolidation import config as consolidation_config
from sleep_jax.lifecycle.dreaming import config as dreaming_config
from sleep_jax.lifecycle.dreaming import dreamer as dreamer_lib
from sleep_jax.lifecycle.dreaming import night as dreaming_night
from sleep_jax.lifecycle.dreaming import study as study_lib
from sleep_jax.models import lora as lora_lib


@dataclasses.dataclass(frozen=True)
class SelfEditConfig:
  """Sections of the learners that study by fine-tuning instances."""

  lora: lora_lib.LoraConfig = lora_lib.LoraConfig()
  trial: dreaming_config.TrialConfig = dreaming_config.TrialConfig()
  dreaming: dreaming_config.DreamingConfig = dreaming_config.DreamingConfig()
  # How documents are sampled for the retention check.
  sleep: consolidation_config.SeedingConfig = (
    consolidation_config.SeedingConfig()
  )


def build_dreamer(
  cfg: SelfEditConfig, setup: base.Setup
) -> dreamer_lib.Dreamer:
  """The dreamer of a learner with these sections.

  Raises:
    ConfigError: if the task has no contexts.
  """
  return dreamer_lib.Dreamer(
    cfg.dreaming,
    cfg.lora,
    cfg.trial,
    cfg.sleep,
    setup.required_format('self_edit'),
    setup.tokenizer,
    setup.costs,
  )


def folds(dreamer: dreamer_lib.Dreamer) -> bool:
  """Whether what is dreamt goes into the backbone's own weights."""
  return dreamer.cfg.enabled and dreamer.cfg.target == 'fold'


def init_adapter(
  dreamer: dreamer_lib.Dreamer, life: life_lib.Life
) -> life_lib.Life:
  """The life with an adapter for what it dreams, where dreaming goes there."""
  if not dreamer.cfg.enabled or dreamer.cfg.target != 'lora':
    return life
  model = life.model
  adapter = lora_lib.init_adapter(
    model.cfg, dreamer.lora, model.params, jax.random.fold_in(life.rng, 0)
  )
  return life.replace(model=model.replace(adapter=adapter))


def dream(
  dreamer: dreamer_lib.Dreamer, life: life_lib.Life
) -> tuple[life_lib.Life, at.Metrics]:
  """A night's dreaming, and its figures."""
  if not dreamer.cfg.enabled or not life.contexts:
    return life, {}
  key = jax.random.fold_in(life.rng, life.clock.nights)
  life, report = dreaming_night.night(dreamer, life, jax.random.fold_in(key, 7))
  return life, {f'dreaming/{k}': v for k, v in report.metrics().items()}


class LoraFinetune(frozen.Frozen):
  """finetune_passage: an instance is trained on the context as it is."""

  name: ClassVar[str] = 'finetune_passage'
  Config: ClassVar[type] = SelfEditConfig

  def __init__(self, cfg: SelfEditConfig, setup: base.Setup):
    super().__init__(cfg, setup)
    setup.required_format(self.name)
    self.dreamer = build_dreamer(cfg, setup)

  def rows(
    self, life: life_lib.Life, request: contexts.StudyRequest, rng: at.Key
  ) -> list[contexts.TrainingRows]:
    """What each attempt trains on."""
    del life, rng
    rows = study_lib.context_rows(self.dreamer.format, request)
    return [rows] * request.attempts

  def study(
    self, life: life_lib.Life, requests: list[contexts.StudyRequest]
  ) -> experience_lib.Answers:
    rng = jax.random.fold_in(life.rng, life.clock.nights)
    rows = [
      self.rows(life, request, jax.random.fold_in(rng, i))
      for i, request in enumerate(requests)
    ]
    return study_lib.train_and_answer(
      self.dreamer, life.model, requests, rows, rng
    )


class TestTimeTraining(LoraFinetune):
  """ttt: an instance is trained on the dreams of an untrained model."""

  name: ClassVar[str] = 'ttt'

  def rows(
    self, life: life_lib.Life, request: contexts.StudyRequest, rng: at.Key
  ) -> list[contexts.TrainingRows]:
    return study_lib.dreamed_rows(self.dreamer, life.model, request, rng)


@dataclasses.dataclass(frozen=True)
class SealConfig(SelfEditConfig):
  """`finetune` is how a day's rows are read, where they are."""

  finetune: finetune_lib.FinetuneConfig = finetune_lib.FinetuneConfig()
  # Whether the adapter that dreams go to first trains on the day's rows, so
  # that seal begins its night with what `sleep` has read.
  reads_day: bool = False

  def __post_init__(self):
    if self.reads_day and self.dreaming.target != 'lora':
      raise config.ConfigError(
        'learner_config.reads_day trains the adapter that dreams go to; set '
        f'dreaming.target=lora, not {self.dreaming.target}.'
      )


class Seal(TestTimeTraining):
  """seal: self-edits of a model that ReST^EM has trained to write them.

  No selection and no random expert: as many dreams are tried as `sleep` tries,
  drawn evenly.
  """

  name: ClassVar[str] = 'seal'
  Config: ClassVar[type] = SealConfig

  def __init__(self, cfg: SealConfig, setup: base.Setup):
    dreaming = dataclasses.replace(
      cfg.dreaming,
      dreams=cfg.dreaming.keep + cfg.dreaming.keep_random,
      importance='random',
      random_expert=0.0,
    )
    super().__init__(dataclasses.replace(cfg, dreaming=dreaming), setup)
    self.reader = None
    if cfg.reads_day:
      finetune = dataclasses.replace(cfg.finetune, target='lora')
      self.reader = finetune_lib.Finetune(
        finetune_lib.FinetunerConfig(finetune, cfg.lora), setup
      )

  @property
  def trains_backbone(self) -> bool:
    return folds(self.dreamer)

  def batch_rows(self) -> dict[str, int]:
    return super().batch_rows() | (
      self.reader.batch_rows() if self.reader else {}
    )

  def init(self, rng: at.Key) -> life_lib.Life:
    if self.reader:
      return self.reader.init(rng)
    return init_adapter(self.dreamer, super().init(rng))

  def wake(
    self, life: life_lib.Life, experience: experience_lib.AnyExperience
  ) -> tuple[life_lib.Life, at.Metrics]:
    metrics = {}
    if self.reader:
      life, metrics = self.reader.wake(life, experience)
    return life.replace(contexts=experience.contexts), metrics

  def sleep(self, life: life_lib.Life) -> tuple[life_lib.Life, at.Metrics]:
    life, metrics = dream(self.dreamer, life)
    return life_lib.end_night(life), metrics
