"""How one model wakes and sleeps: its plan, and what stands in its place."""

import dataclasses
from typing import Any

from sleep_jax import config
from sleep_jax import plan as plan_lib
from sleep_jax.learners import sleep as sleep_lib
from sleep_jax.lifecycle import wake as wake_lib
from sleep_jax.lifecycle.consolidation import config as consolidation_config

# Fields of a plan that give the memory its shape, or the clock its tick.
FIXED = ('fast_layers', 'expert_layers', 'rank', 'slots')


@dataclasses.dataclass(frozen=True)
class Settings:
  """Everything about a `Sleeper` but its life.

  name, digest: of the pretrained model.
  plan: in force; until the first day, without knowing the text.
  given: fields of it that were asked for.
  planned: whether the plan was made for a text.
  chat_tokens: of the frame of the tokenizer's chat template; 0 = it has none.
  own_levels: whether the model's levels are not the plan's.
  wake, seeding: in place of the plan's.
  """

  name: str
  digest: str
  plan: plan_lib.Plan
  given: dict[str, Any]
  planned: bool = False
  chat_tokens: int = 0
  own_levels: bool = False
  wake: wake_lib.WakeConfig | None = None
  seeding: consolidation_config.SeedingConfig | None = None

  def model_config(self, cfg: config.ModelConfig) -> config.ModelConfig:
    """The config of the model `cfg` with the plan's levels."""
    if self.own_levels:
      return cfg
    return self.plan.model_config(plan_lib.plain(cfg))

  def learner(self, vocab: int) -> sleep_lib.SleepConfig:
    """The config of the learner, of a model of `vocab` pieces."""
    return sleep_lib.SleepConfig(
      wake=self.wake or self.plan.wake(),
      sleep=self.seeding or self.plan.seeding(vocab, self.chat_tokens),
    )

  def changed(self, **given: Any) -> 'Settings':
    """These settings with fields of the plan changed, in a life that began.

    Raises:
      ConfigError: for a field that a life cannot change, or does not have.
    """
    if not given:
      return self
    plan_lib.check_fields(given)
    fixed = {*FIXED, 'chunk'} - {'slots'}
    for name in sorted(fixed & set(given)):
      if given[name] != getattr(self.plan, name):
        raise config.ConfigError(
          f'{name}={given[name]}: this life has {name}='
          f'{getattr(self.plan, name)}, which stays; begin a new one.'
        )
    return dataclasses.replace(
      self,
      plan=dataclasses.replace(self.plan, **given),
      given=self.given | given,
    )

  def replanned(
    self, cfg: config.ModelConfig, lengths: list[int]
  ) -> 'Settings':
    """These settings for documents of so many tokens each, before day 1."""
    kept = {name: getattr(self.plan, name) for name in FIXED}
    given = kept | self.given
    if self.own_levels and (chunks := [l.chunk for l in cfg.levels if l.chunk]):
      given = {'chunk': min(chunks), 'window': max(chunks), **given}
    plan = plan_lib.plan(
      plan_lib.plain(cfg), lengths, chat_tokens=self.chat_tokens, **given
    )
    return dataclasses.replace(self, plan=plan, planned=True)

  def to_json(self) -> dict[str, Any]:
    """As JSON values."""
    return dataclasses.asdict(self)

  @classmethod
  def from_json(cls, values: dict[str, Any]) -> 'Settings':
    """The settings that `to_json` gave, among other values.

    Raises:
      ConfigError: if they are of another version, or damaged.
    """
    sections = {
      'plan': plan_lib.Plan,
      'wake': wake_lib.WakeConfig,
      'seeding': consolidation_config.SeedingConfig,
    }
    known = {f.name for f in dataclasses.fields(cls)}
    values = {k: v for k, v in values.items() if k in known}
    for name, kind in sections.items():
      if name == 'plan' or values.get(name) is not None:
        values[name] = config.from_mapping(kind, values.get(name), name)
    config.check_mapping(values.get('given'), 'given')
    plan_lib.check_fields(values['given'])
    return config.from_mapping(cls, values, 'settings')
