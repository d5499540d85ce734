"""How a life wakes, sleeps, dreams and is taught."""

import dataclasses

from sleep_jax.config import reading


@dataclasses.dataclass(frozen=True)
class WakeConfig:
  """How a life reads its day."""

  lanes: int = 8  # Rows read side by side; one update averages over them.
  persistent: bool = True  # False: fast memory is per row, and ends with it.


@dataclasses.dataclass(frozen=True)
class RecurrenceConfig:
  """Sleep by recurrence (arXiv 2605.26099, Algorithm 1), and its controls."""

  passes: int = 1  # N: times the blocks pass over a window; 1 is no sleep.
  eviction: str = 'hard'  # or sliding: the last window stays attended to.
  loop: tuple[int, int] = (0, 0)  # First block that is looped, and the end.
  # Controls: what a pass hands to the next one.
  carry_features: bool = True  # False: each pass begins at the embeddings.
  carry_states: bool = True  # False: at the states that the window found.
  # A learned rule: each window stops by itself, after `passes` at the latest.
  halting: bool = False
  ponder: float = 0.01  # Loss per pass expected of it.
  remat: bool = True  # Compute a window's activations anew for its gradient.

  def __post_init__(self):
    reading.choose(
      self.eviction, {'hard': 0, 'sliding': 0}, 'recurrence.eviction'
    )
    object.__setattr__(self, 'loop', tuple(self.loop))
    if self.passes < 1:
      raise reading.ConfigError(
        f'recurrence.passes={self.passes} must be at least 1; 1 reads a window '
        'once, as a plain hybrid does.'
      )
    if self.halting and not self.carry_states:
      raise reading.ConfigError(
        'recurrence.halting stops between states that are carried on; set '
        'recurrence.carry_states=True.'
      )

  def looped(self, layers: int) -> range:
    """The blocks that every pass computes.

    Raises:
      ConfigError: if they are not a part of a model of so many layers.
    """
    first, end = self.loop if any(self.loop) else (0, layers)
    if not 0 <= first < end <= layers:
      raise reading.ConfigError(
        f'recurrence.loop={self.loop} must be (first, end) with 0 <= first < '
        f'end <= {layers} (model.layers), or (0, 0) for all.'
      )
    return range(first, end)


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
  """How a hybrid learns to sleep by recurrence; the paper's learning rates.

  Warm-up, clip, decay and weight decay are those of the recipe it follows.
  """

  steps: int = 1000
  batch: int = 64  # Sequences of a step.
  muon_learning_rate: float = 2e-3  # Of matrices inside the blocks.
  adam_learning_rate: float = 5e-5  # Of everything else.
  weight_decay: float = 1e-4  # Of the matrices.
  warmup: float = 0.01  # Share of the steps, and
  decay: float = 0.6  # the share at the end that falls to a thousandth.
  draw_passes: tuple[int, ...] = ()  # N, drawn anew for every 20 steps, if any.
  exams: int = 10  # Over the training, evenly.
  exam_rows: int = 512  # Sequences of an exam; the last has four times more.
  exam_passes: tuple[int, ...] = ()  # N to be examined with as well, at last.

  def __post_init__(self):
    for name in ('draw_passes', 'exam_passes'):
      object.__setattr__(self, name, tuple(getattr(self, name)))
    for name in ('steps', 'batch', 'exams', 'exam_rows'):
      if getattr(self, name) < 1:
        raise reading.ConfigError(
          f'training.{name}={getattr(self, name)} must be at least 1.'
        )
    if self.steps % self.exams:
      raise reading.ConfigError(
        f'training.steps={self.steps} is not a multiple of training.exams='
        f'{self.exams}; change one of them.'
      )


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
  """How the baselines that change the backbone's weights train."""

  batch: int = 8  # Rows of a step.
  learning_rate: float = 1e-3
  weight_decay: float = 0.0
  ewc_lambda: float = 1e3  # Pull per unit of normalised Fisher information.
  ewc_decay: float = 1.0  # gamma of online EWC: F <- gamma F + F_new.
  fisher_rows: int = 128  # Rows whose gradients make an episode's Fisher.


@dataclasses.dataclass(frozen=True)
class SeedingConfig:
  """Knowledge Seeding (Sleep section 4).

  The paper gives no number for alpha, gamma, lambda, z_0 or beta, nor for the
  amount of dreams; these are ours, and the ablations show what they do.
  """

  teachers: str = 'awake+old_self'  # or 'awake', the paper's letter.
  sender_reset: str = 'restart'  # or 'carry': see consolidation.Compute.
  slot_policy: str = 'error'  # When a bank is full: error | merge | recycle.
  # Dreams: the data set D, sampled from the teachers.
  dreams: int = 1024  # Rows, half of them from each self.
  dream_length: int = 64  # Tokens of a row, the leading BOS included.
  temperature: float = 1.0
  # Tokens below this share of the likeliest one's probability are not dreamt:
  # what a small self says in its tail is noise that nobody will ask about.
  min_p: float = 0.0
  # Least and largest share of the old self; n / (n + 1) of n nights between.
  old_share: tuple[float, float] = (0.5, 1.0)
  splice: bool = True  # Interleave segments of both selves in one row.
  # Distillation.
  optimizer: str = 'adam'  # or muon.
  teacher_temperature: float = 1.0  # Below 1 sharpens what is copied.
  # With a large vocabulary: keep so many of a teacher's logits per token, the
  # rest as one outcome, and so many tokens' logits at a time; 0 = all of both.
  teacher_top_k: int = 0
  tokens_in_flight: int = 512
  # Extra weight of a token per nat that the selves disagree on it: of tokens
  # that the awake, and that the old self owns.
  emphasis: tuple[float, float] = (0.0, 0.0)
  steps: int = 200
  batch: int = 32
  learning_rate: float = 3e-3
  divergence: str = 'forward_kl'  # or reverse_kl | jsd.
  beta: float = 0.5  # Of jsd; must stay away from 0 and 1.
  lam: float = 0.25  # lambda: share of the student's own rollouts.
  alpha: float = 0.9  # 1 = imitation (LTI) off.
  # Routing of the new expert.
  router_weight: float = 0.1  # Weight of the provenance loss; 0 = off.
  router_margin: float = 0.1  # Nats of disagreement that make a token new.
  # Controls.
  train_expert: bool = True  # False: a random, untrained expert.
  expand: bool = True  # False: every night trains the same one expert.
  # Learning to imitate.
  prefixes: int = 16  # Dreams cut and continued per rollout round.
  group: int = 4  # Continuations of each: the group-relative baseline.
  rollout_groups: int = 4  # Groups of rollouts in one step's batch.
  rollout_every: int = 20  # Steps between rollout rounds.
  continuation: int = 24  # Tokens.
  gamma: float = 0.5  # Weight of r_sem in Eq. 3.
  z0: float = 0.5  # Eq. 4's cut, as a share of the longer sequence.
  semantic: str = 'teacher_embedding'  # or exact.
  semantic_threshold: float = 0.9
  # A sleep whose final KL is above this share of the first has failed.
  max_kl_share: float = 0.8

  def __post_init__(self):
    reading.choose(
      self.teachers,
      {'awake': 0, 'awake+old_self': 0},
      'sleep.teachers',
    )
    reading.choose(
      self.sender_reset, {'restart': 0, 'carry': 0}, 'sleep.sender_reset'
    )
    reading.choose(
      self.slot_policy,
      {'error': 0, 'merge': 0, 'recycle': 0},
      'sleep.slot_policy',
    )
    object.__setattr__(self, 'old_share', tuple(self.old_share))
    object.__setattr__(self, 'emphasis', tuple(self.emphasis))
    if not 0.0 <= self.old_share[0] <= self.old_share[1] <= 1.0:
      raise reading.ConfigError(
        f'sleep.old_share={self.old_share} must be (least, largest) in [0, 1].'
      )
    for name in ('lam', 'alpha', 'gamma'):
      if not 0.0 <= getattr(self, name) <= 1.0:
        raise reading.ConfigError(
          f'sleep.{name}={getattr(self, name)} is a share; choose 0 to 1.'
        )
    if self.divergence == 'jsd' and not 0.01 <= self.beta <= 0.99:
      raise reading.ConfigError(
        f'sleep.beta={self.beta}: the generalised JSD vanishes near 0 and 1;'
        ' use divergence=forward_kl or reverse_kl there.'
      )


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """Low-rank adapters of the backbone's matrices: W + alpha / rank A B."""

  rank: int = 32
  alpha: float = 64.0
  # Of q | k | v | o of the attention and gate | up | down of every level.
  targets: tuple[str, ...] = ('q', 'v')
  slowest_only: bool = False  # Of the levels, only the last has adapters.

  def __post_init__(self):
    object.__setattr__(self, 'targets', tuple(self.targets))
    known = ('q', 'k', 'v', 'o', 'gate', 'up', 'down')
    if not self.targets:
      raise reading.ConfigError(f'lora.targets is empty; choose among {known}.')
    for target in self.targets:
      reading.choose(target, dict.fromkeys(known), 'lora.targets')
    if self.rank < 1:
      raise reading.ConfigError(f'lora.rank={self.rank} must be at least 1.')


@dataclasses.dataclass(frozen=True)
class TrialConfig:
  """How an isolated instance is fine-tuned on one dream.

  The defaults are SEAL's for one passage: AdamW, decaying to zero.
  """

  epochs: int = 10
  batch: int = 1  # Rows of a step.
  learning_rate: float = 1e-3
  # Of many contexts studied together, as SEAL trains 200 otherwise than one.
  joint_epochs: int = 0  # 0: as above.
  joint_learning_rate: float = 0.0
  repeats: int = 1  # A trial's mark is the mean over so many fine-tunings.
  max_steps: int = 400  # A dream that asks for more is rejected: `too long`.
  at_once: int = 64  # Instances in one program; bounds its memory.

  def __post_init__(self):
    for name in ('epochs', 'batch', 'repeats', 'max_steps', 'at_once'):
      if getattr(self, name) < 1:
        raise reading.ConfigError(
          f'trial.{name}={getattr(self, name)} must be at least 1.'
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
  dreams: int = 10
  temperature: float = 1.0
  top_p: float = 1.0
  random_expert: float = 0.3  # Gate of one random expert per router; 0 = none.
  # Step 2: which are tried.
  importance: str = 'grad_cosine'  # | grad_norm | greats | loss | random.
  # The leaves of a fresh adapter whose gradient is looked at.
  importance_targets: tuple[str, ...] = ('q', 'v')
  importance_rows: int = 16  # Most rows of a dream that are looked at.
  keep: int = 4  # k of highest importance.
  keep_random: int = 1  # b of the others.
  # Step 5: ReST^EM.
  rounds: int = 1  # Of steps 1 to 5 in a night.
  learn_from: str = 'best'  # of each context; or all: every rewarded dream.
  restart: bool = False  # True: each round trains anew from before dreaming.
  target: str = 'lora'  # Where it goes: lora | fold (into weights) | slot.
  epochs: int = 4
  batch: int = 8
  learning_rate: float = 1e-3
  # If documents of the self before dreaming lose more than so many nats per
  # token, the night's dreaming is rolled back.
  retention_margin: float = 0.2
  retention_rows: int = 64
  retention_length: int = 32  # Tokens of such a row.
  # At an exam: dreams of each context that are trained on; and whether `sleep`
  # first spends a day on the contexts, in so many rows, and a night.
  study_dreams: int = 1
  study_night: bool = False
  study_rows: int = 64

  def __post_init__(self):
    object.__setattr__(
      self, 'importance_targets', tuple(self.importance_targets)
    )
    rules = ('grad_cosine', 'grad_norm', 'greats', 'loss', 'random')
    reading.choose(self.importance, dict.fromkeys(rules), 'dreaming.importance')
    reading.choose(
      self.learn_from, {'best': 0, 'all': 0}, 'dreaming.learn_from'
    )
    reading.choose(
      self.target, {'lora': 0, 'fold': 0, 'slot': 0}, 'dreaming.target'
    )
    if self.keep + self.keep_random > self.dreams:
      raise reading.ConfigError(
        f'dreaming: keep={self.keep} and keep_random={self.keep_random} are '
        f'more than dreams={self.dreams}.'
      )
    if self.restart and self.target == 'fold':
      raise reading.ConfigError(
        'dreaming.restart needs the self before dreaming, which target=fold '
        'overwrites; use target=lora or slot.'
      )
