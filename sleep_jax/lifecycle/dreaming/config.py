"""Settings of a night of dreaming, and of the trials of its dreams."""

import dataclasses

from sleep_jax.config import base


@dataclasses.dataclass(frozen=True)
class TrialConfig:
  """How an isolated instance is fine-tuned on one dream.

  The defaults are SEAL's for one passage: AdamW, decaying to zero.
  """

  epochs: base.Count = 10
  batch: base.Count = 1  # Rows of a step.
  # Rows of an update are packed side by side into rows of so many tokens, as
  # those of a day are by `wake.window`; 0 = one each.
  window: int = 0
  learning_rate: float = 1e-3
  # Of many contexts studied together, as SEAL trains 200 otherwise than one.
  joint_epochs: int = 0  # 0: as above.
  joint_learning_rate: float = 0.0
  # A trial's score is the mean over so many fine-tunings.
  repeats: base.Count = 1
  # A dream that asks for more is rejected: `too long`.
  max_steps: base.Count = 400
  max_parallel: base.Count = 64  # Instances in one program; bounds its memory.

  def __post_init__(self):
    if self.window == 1:
      raise base.ConfigError(
        f'trial.window={self.window}: rows of a token have no target; use 2 or '
        'more, or 0 for a row each.'
      )

  def joint(self) -> 'TrialConfig':
    """The same for many contexts together."""
    return dataclasses.replace(
      self,
      epochs=self.joint_epochs or self.epochs,
      learning_rate=self.joint_learning_rate or self.learning_rate,
    )


@dataclasses.dataclass(frozen=True)
class DreamingConfig:
  """Dreaming (Sleep section 6); the paper leaves m, k, b and omega's g open."""

  enabled: bool = True
  # Step 1: m dreams per context.
  dreams: base.Count = 10
  temperature: float = 1.0
  top_p: base.Fraction = 1.0
  # Gate of one random expert per router; 0 = none.
  random_expert: base.Fraction = 0.3
  # Step 2: which are tried.
  importance: str = 'grad_cosine'  # | grad_norm | greats | loss | random.
  # The leaves of a fresh adapter whose gradient is looked at.
  importance_targets: tuple[str, ...] = ('q', 'v')
  importance_rows: base.Count = 16  # Most rows of a dream that are looked at.
  keep: int = 4  # k of highest importance.
  keep_random: int = 1  # b of the others.
  # Step 5: ReST^EM.
  rounds: base.Count = 1  # Of steps 1 to 5 in a night.
  # best of each context | all that were rewarded | tried: whatever its reward.
  learn_from: str = 'best'
  restart: bool = False  # True: each round trains anew from before dreaming.
  target: str = 'lora'  # Where it goes: lora | fold (into weights) | slot.
  epochs: base.Count = 4
  batch: base.Count = 8
  learning_rate: float = 1e-3
  # Rows of documents of the model before dreaming beside each batch, on which
  # it stays close to that model (KL): what ReST^EM does not rehearse it
  # overwrites. SEAL and the paper have none.
  rehearsed: int = 0
  # If documents of the model before dreaming lose more than so many nats per
  # token, the night's dreaming is rolled back.
  retention_margin: base.Margin = 0.2
  retention_rows: base.Count = 64
  retention_length: base.Count = 32  # Tokens of such a row.
  # In a study: dreams of each context that are trained on; and whether `sleep`
  # first spends a day on the contexts, in so many rows, and a night.
  study_dreams: base.Count = 1
  study_night: bool = False
  study_rows: base.Count = 64

  def __post_init__(self):
    object.__setattr__(
      self, 'importance_targets', tuple(self.importance_targets)
    )
    rules = ('grad_cosine', 'grad_norm', 'greats', 'loss', 'random')
    base.lookup(self.importance, dict.fromkeys(rules), 'dreaming.importance')
    choices = {'best': 0, 'all': 0, 'tried': 0}
    base.lookup(self.learn_from, choices, 'dreaming.learn_from')
    base.lookup(
      self.target, {'lora': 0, 'fold': 0, 'slot': 0}, 'dreaming.target'
    )
    if self.keep + self.keep_random > self.dreams:
      raise base.ConfigError(
        f'dreaming: keep={self.keep} and keep_random={self.keep_random} are '
        f'more than dreams={self.dreams}.'
      )
    if self.restart and self.target == 'fold':
      raise base.ConfigError(
        'dreaming.restart needs the model before dreaming, which target=fold '
        'overwrites; use target=lora or slot.'
      )
