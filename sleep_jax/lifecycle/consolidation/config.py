"""Settings of a night of consolidation."""

import dataclasses

from sleep_jax.config import base
from sleep_jax.objectives import divergences

_CHOICES = dict(
  teachers=('current', 'current+previous'),
  sender_reset=('restart', 'carry'),
  slot_policy=('error', 'merge', 'fold', 'recycle'),
  semantic=('teacher_embedding', 'encoder', 'exact'),
  optimizer=('adam', 'muon'),
  divergence=('forward_kl', 'reverse_kl', 'jsd'),
)


@dataclasses.dataclass(frozen=True)
class SeedingConfig:
  """Knowledge Seeding (Sleep section 4).

  The paper gives no number for alpha, gamma, lambda, z_0 or beta, nor for the
  amount of dreams; these are ours, and the ablations show what they do.
  """

  consolidate: bool = True  # False: nothing moves at night.
  teachers: str = 'current+previous'  # or 'current', the paper's letter.
  sender_reset: str = 'restart'  # or 'carry': see `transfer.compute`.
  # When a bank is full: error | merge | fold | recycle, see `slots`.
  slot_policy: str = 'error'
  # Dreams: the data set D, sampled from the teachers.
  dreams: base.Count = 1024  # Rows, half of them from each teacher.
  dream_length: base.Count = 64  # Tokens of a row, the leading BOS included.
  temperature: float = 1.0
  # Of all turns but the last, where a frame has several: other questions, and
  # answers that are meant. 0 = `temperature`.
  question_temperature: float = 0.0
  # Weight of questions' tokens as targets; answers have 1. See
  # `generation.Documents.last_turns`.
  question_weight: base.Fraction = 1.0
  # Documents to choose each dream from: those that are whole and different,
  # evenly over their last turns, see `generation.keep`; 1 = as they come.
  oversample: base.Count = 1
  # Tokens below this share of the likeliest one's probability are not sampled.
  min_p: base.Fraction = 0.0
  # Least and largest fraction of tokens from the previous model; after n
  # nights it is n / (n + 1) between them.
  previous_fraction: tuple[float, float] = (0.5, 1.0)
  # Interleave segments of both teachers in one row, and archived ones with each
  # other; they are labelled in the documents that they were dreamt in.
  splice: bool = True
  # Segments that were dreamt several times are spliced in as often as others: a
  # model that has read a day over and over repeats a few of its sentences.
  distinct: bool = False
  # Shares of the dreams that begin with the chat template up to the user's
  # turn, and with the frames of the day's documents; the rest with BOS.
  chat_dreams: base.Fraction = 0.0
  day_dreams: base.Fraction = 0.0
  # Distillation.
  optimizer: str = 'adam'  # or muon.
  teacher_temperature: base.Positive = 1.0  # Below 1 sharpens what is copied.
  # With a large vocabulary: keep so many of a teacher's logits per token, the
  # rest as one outcome, and so many tokens' logits of a device at a time; 0 =
  # all of both.
  teacher_top_k: int = 0
  tokens_in_flight: base.Count = 512
  # Distil over the tokens alone that occur in the dreams, renormalised. With a
  # large vocabulary most of a step is logits of tokens that never occur.
  dream_vocab: bool = False
  # Rows of earlier nights' dreams that are kept with what their teachers
  # predicted, and rehearsed beside D; needs `teacher_top_k`.
  archive: int = 0
  # Least share of D in what is rehearsed; below it the archive's nights have as
  # much each as today and the previous model, which make up D.
  least_fresh: base.Fraction = 0.0
  # Rows of it that are there before the first day: what the base dreams of. A
  # day overwrites what it does not rehearse, and a base is never read again.
  archive_base: int = 0
  # Those rows all stay. Otherwise they count as those of one night, and a base
  # knows more than a night teaches: after many it is rehearsed too seldom.
  archive_keeps_base: bool = False
  # Of its dreams a night archives the segments alone that this day taught: with
  # a token on which the teachers differ by `router_margin`. The more a model
  # knows, the less of what it dreams is new; what it knew is archived already.
  archive_only_new: bool = False
  # Where the current model gives a token more than this probability, and the
  # previous one, and the archive, another token, the day has told it otherwise,
  # and the past has no weight there; 1 = never. Of use where a day overwrites
  # only what it speaks of (`wake.rehearsed`).
  contradicted: base.Fraction = 1.0
  # Extra weight of a token per nat that the teachers disagree on it: of tokens
  # from the current model, and of those from the previous one.
  disagreement_weight: tuple[float, float] = (0.0, 0.0)
  steps: base.Count = 200
  batch: base.Count = 32
  learning_rate: float = 3e-3
  divergence: str = 'forward_kl'  # or reverse_kl | jsd.
  beta: base.Fraction = 0.5  # Of jsd; must stay away from 0 and 1.
  lam: base.Fraction = 0.25  # lambda: fraction of the student's own rollouts.
  alpha: base.Fraction = 0.9  # 1 = imitation (LTI) off.
  # Whether the experts of earlier nights go on training beside the new one. The
  # paper leaves them as they are; what they say of a fact that is rehearsed
  # then has to be mended by the new one alone.
  retrain_experts: bool = False
  # Routing of the new expert.
  router_weight: float = 0.1  # Weight of the provenance loss; 0 = off.
  router_margin: float = 0.1  # Nats of disagreement that make a token new.
  # Controls.
  train_expert: bool = True  # False: a random, untrained expert.
  expand: bool = True  # False: every night trains the same one expert.
  # Learning to imitate.
  prefixes: base.Count = 16  # Dreams cut and continued per rollout round.
  group: base.Count = 4  # Continuations of each: the group-relative baseline.
  rollout_groups: base.Count = 4  # Groups of rollouts in one step's batch.
  rollout_every: base.Count = 20  # Steps between rollout rounds.
  continuation: base.Count = 24  # Tokens.
  gamma: base.Fraction = 0.5  # Weight of r_sem in Eq. 3.
  z0: base.Fraction = 0.5  # Eq. 4's cut, as a fraction of the longer sequence.
  # What judges r_sem: teacher_embedding, the teacher's own states; encoder,
  # frozen static word embeddings (`inference.encoder`); or exact equality.
  semantic: str = 'teacher_embedding'
  semantic_threshold: float = 0.9  # Least cosine that counts as the same.
  # A transfer whose final KL is above this fraction of the first has failed.
  max_kl_share: base.Positive = 0.8

  def __post_init__(self):
    for name, known in _CHOICES.items():
      base.lookup(getattr(self, name), dict.fromkeys(known), f'sleep.{name}')
    for name in ('previous_fraction', 'disagreement_weight'):
      object.__setattr__(self, name, tuple(getattr(self, name)))
    least, most = self.previous_fraction
    if not 0.0 <= least <= most <= 1.0:
      raise base.ConfigError(
        f'sleep.previous_fraction={self.previous_fraction} must be (least, '
        'largest) in [0, 1].'
      )
    if self.distinct and not self.splice:
      raise base.ConfigError(
        'sleep.distinct=True is about the segments that sleep.splice '
        'interleaves; set sleep.splice=True.'
      )
    if not self.temperature and self.chat_dreams + self.day_dreams < 1.0:
      raise base.ConfigError(
        'sleep.temperature=0 writes the same document every time that it '
        'begins with BOS; set sleep.day_dreams=1, or a temperature.'
      )
    if self.archive and not self.teacher_top_k:
      raise base.ConfigError(
        f'sleep.archive={self.archive} keeps the likeliest tokens of each '
        'prediction; say how many by sleep.teacher_top_k.'
      )
    if self.archive_base > self.archive:
      raise base.ConfigError(
        f'sleep.archive_base={self.archive_base} rows do not fit sleep.archive='
        f'{self.archive}; raise sleep.archive, or lower it.'
      )
    if self.archive_keeps_base and not 0 < self.archive_base < self.archive:
      raise base.ConfigError(
        f'sleep.archive_keeps_base=True with sleep.archive_base='
        f'{self.archive_base} of sleep.archive={self.archive} rows leaves none '
        'for the base or none for the nights; choose a number between.'
      )
    if self.archive_only_new and not (
      self.archive and self.teachers == 'current+previous'
    ):
      raise base.ConfigError(
        'sleep.archive_only_new=True is about the archive, and tells by two '
        'teachers what is new; set sleep.archive and sleep.teachers='
        'current+previous, or archive_only_new=False.'
      )
    if self.chat_dreams + self.day_dreams > 1.0 + 1e-6:
      raise base.ConfigError(
        f'sleep.chat_dreams={self.chat_dreams} and sleep.day_dreams='
        f'{self.day_dreams} are shares of one whole; lower one of them.'
      )
    divergences.check_beta(self.divergence, self.beta, 'sleep')

  @property
  def uses_rollouts(self) -> bool:
    """Whether the student's own rollouts are of any use."""
    return self.alpha < 1.0 or self.lam > 0.0
