"""replay: sft on the day and on what the model of this morning makes up.

Generative replay without a teacher's probabilities, and without experts: the
model as the day begins writes documents, and each batch has so many of them
beside the day's rows. Nothing outside the life is read. Nothing is kept from
one day to the next but the model itself, or, with `learner_config.archive`,
documents that it wrote in the evening: the part of sleep's archive that needs
no teacher.
"""

from collections.abc import Iterator
import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.data import experience as experience_lib
from sleep_jax.data import mixing
from sleep_jax.data import order as order_lib
from sleep_jax.data import packing
from sleep_jax.learners import finetune
from sleep_jax.lifecycle import archive as archive_lib
from sleep_jax.lifecycle import life as life_lib
from sleep_jax.lifecycle.consolidation import config as consolidation_config
from sleep_jax.lifecycle.consolidation import generation
from sleep_jax.lifecycle.consolidation import replay as replay_lib
from sleep_jax.metrics import observation
from sleep_jax.models import model as model_lib


@dataclasses.dataclass(frozen=True)
class ReplayConfig(finetune.FinetunerConfig):
  """`sleep` says how documents are sampled, as it does for the learner sleep.

  A temperature and a min_p here stand in place of that section's.
  """

  sleep: consolidation_config.SeedingConfig = (
    consolidation_config.SeedingConfig()
  )
  documents: int = 0  # Rows sampled a day; 0 = as many as the day has.
  # Documents kept, as many of each day: what the model writes in the evening
  # and did not know in the morning (`replay.sample_new`). They are rehearsed in
  # place of what it would write on the next morning; 0 = none.
  archive: int = 0
  # Of them, what the base writes before the first day (`sleep.archive_base`).
  archive_base: int = 0
  archive_keeps_base: bool = False  # They all stay (`sleep` has the same).
  mix: config.Fraction = 0.5  # Share of documents in the rows of a batch.
  temperature: float | None = None
  min_p: float | None = None

  def __post_init__(self):
    if not 0 < self.documents_per_batch < self.finetune.batch:
      raise config.ConfigError(
        f'learner_config.mix={self.mix} of finetune.batch='
        f'{self.finetune.batch} rows leaves no row for the documents, or none '
        'for the day; choose another mix or a larger batch (without documents '
        'this is learner sft).'
      )

    if self.archive_base > self.archive:
      raise config.ConfigError(
        f'learner_config.archive_base={self.archive_base} documents do not fit '
        f'learner_config.archive={self.archive}; raise it, or lower them.'
      )
    if self.archive_keeps_base and not 0 < self.archive_base < self.archive:
      raise config.ConfigError(
        f'learner_config.archive_keeps_base=True with archive_base='
        f'{self.archive_base} of archive={self.archive} documents leaves none '
        'for the base or none for the days; choose a number between.'
      )

  @property
  def documents_per_batch(self) -> int:
    """Rows of a batch that are documents."""
    return round(self.mix * self.finetune.batch)

  def sampling(self) -> consolidation_config.SeedingConfig:
    """How documents are sampled."""
    own = dict(temperature=self.temperature, min_p=self.min_p)
    own = {k: v for k, v in own.items() if v is not None}
    return dataclasses.replace(self.sleep, **own)


class ReplayFinetune(finetune.Finetune):
  """Fine-tuning on the day's rows and on sampled documents.

  `learner_state`, with an archive: 'tokens' `[N, T]`, 'weight' `[N, T]` and
  'night' `[N]` of the documents that are kept.
  """

  name: ClassVar[str] = 'replay'
  Config: ClassVar[type] = ReplayConfig

  def batch_rows(self) -> dict[str, int]:
    rows = super().batch_rows()
    if self.cfg.documents:
      rows['learner_config.documents'] = self.cfg.documents
    return rows

  def init(self, rng: at.Key) -> life_lib.Life:
    life = super().init(rng)
    if self.cfg.archive_base:
      return life.replace(learner_state=self._documents_of_base(life, rng))
    if self.cfg.archive:
      rows = np.zeros((0, self.cfg.sleep.dream_length), np.int32)
      life = life.replace(learner_state=_kept(rows, rows, rows[:, 0]))
    return life

  def _documents_of_base(
    self, life: life_lib.Life, rng: at.Key
  ) -> dict[str, np.ndarray]:
    """What is kept before the first day."""
    with self.setup.costs.phase('rollout') as cost:
      drawn = generation.sample_as_it_is(
        self.cfg.sleep,
        life.model.merged(),
        self.setup.tokenizer,
        self.cfg.archive_base,
        rng,
      )
      cost.add_forward(drawn.tokens.size)
    return _kept(
      *_with_weights(drawn), np.full(len(drawn.tokens), archive_lib.BASE_NIGHT)
    )

  def wake(
    self, life: life_lib.Life, experience: experience_lib.AnyExperience
  ) -> tuple[life_lib.Life, at.Metrics]:
    if not self.cfg.archive:
      return super().wake(life, experience)
    # A copy: training donates the weights of the morning.
    morning = jax.tree.map(jnp.array, life.model.merged())
    life, metrics = super().wake(life, experience)
    return self._keep(life, morning), metrics

  def _keep(
    self, life: life_lib.Life, morning: model_lib.Model
  ) -> life_lib.Life:
    """The life after it has written down what it learnt since the morning."""
    cfg, state = self.cfg.sampling(), life.learner_state
    state = jax.tree.map(np.asarray, state)
    night = int(life.clock.nights)
    nights, size = np.unique(state['night']), self.cfg.archive
    of_base = np.zeros(0, int)
    if self.cfg.archive_keeps_base:
      of_base = np.flatnonzero(state['night'] == archive_lib.BASE_NIGHT)
      nights, size = (
        nights[nights != archive_lib.BASE_NIGHT],
        size - len(of_base),
      )
    quota = size // (len(nights) + 1)
    key = jax.random.fold_in(life.rng, night)
    with self.setup.costs.phase('rollout') as cost:
      drawn = replay_lib.sample_new(
        cfg,
        (life.model.merged(), morning),
        self.setup.tokenizer,
        quota,
        jax.random.fold_in(key, 3),
        life.frames,
      )
      times = 1 if cfg.oversample == 1 else 3 * cfg.oversample
      cost.add_forward(drawn.tokens.size, times=times)
    observation.documents('in the evening', drawn.tokens, drawn.lengths)
    # What was kept first of a night was the best of it, see `generation.keep`.
    old = [np.flatnonzero(state['night'] == x)[:quota] for x in nights]
    index = np.concatenate([of_base, *old])
    new = _kept(*_with_weights(drawn), np.full(len(drawn.tokens), night))
    return life.replace(
      learner_state={k: np.concatenate([state[k][index], new[k]]) for k in new}
    )

  def documents(
    self, life: life_lib.Life, shape: tuple[int, int]
  ) -> tuple[np.ndarray, np.ndarray]:
    """Documents of the life's model as it is, or those that it has kept.

    Args:
      life: as the day begins.
      shape: of the day's rows, `[N, T]`: as many documents, unless
        `learner_config.documents` says how many. Those that end before
        `sleep.dream_length` are packed into rows of T tokens.

    Returns:
      Tokens and weights `[N', T']`.
    """
    if self.cfg.archive and len(life.learner_state['tokens']):
      state = jax.tree.map(np.asarray, life.learner_state)
      return self._packed(state['tokens'], state['weight'], shape[1])
    key = jax.random.fold_in(life.rng, life.clock.nights)
    cfg = self.cfg.sampling()
    with self.setup.costs.phase('rollout') as cost:
      drawn = generation.sample(
        cfg,
        life.model.merged(),
        self.setup.tokenizer,
        self.cfg.documents or shape[0],
        jax.random.fold_in(key, 1),
        life.frames,
      )
      cost.add_forward(drawn.tokens.size, times=cfg.oversample)
    observation.documents('in the morning', drawn.tokens, drawn.lengths)
    return self._packed(*_with_weights(drawn), shape[1])

  def _packed(
    self, tokens: np.ndarray, weight: np.ndarray, length: int
  ) -> tuple[np.ndarray, np.ndarray]:
    """The documents, packed where they end before rows of `length` do."""
    if self.setup.tokenizer.stop < 0 or tokens.shape[1] >= length:
      return tokens, weight
    written = [x[w > 0].tolist() for x, w in zip(tokens, weight, strict=True)]
    return packing.pack(written, length, self.setup.tokenizer.pad)

  def _blocks(
    self, life: life_lib.Life, experience: experience_lib.AnyExperience
  ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The blocks of sft, with documents beside the rows of every batch."""
    day = experience_lib.in_memory(experience, self.name)
    documents = self.documents(life.with_frames(day.frames), day.tokens.shape)
    key = jax.random.fold_in(life.rng, life.clock.nights)
    beside = mixing.Beside(
      documents,
      self.cfg.documents_per_batch,
      order_lib.numpy_rng(jax.random.fold_in(key, 2)),
    )
    for rows in super()._blocks(life, day):
      yield beside.batches(
        rows, self.cfg.finetune.batch, self.setup.tokenizer.pad
      )


def _with_weights(
  drawn: generation.Documents,
) -> tuple[np.ndarray, np.ndarray]:
  """Tokens, and 1 for each that is a document's."""
  inside = np.arange(drawn.tokens.shape[1]) < drawn.lengths[:, None]
  return drawn.tokens, inside.astype(np.float32)


def _kept(
  tokens: np.ndarray, weight: np.ndarray, night: np.ndarray
) -> dict[str, np.ndarray]:
  """`ReplayFinetune.learner_state`."""
  return {
    'tokens': np.asarray(tokens, np.int32),
    'weight': np.asarray(weight, np.float32),
    'night': np.asarray(night, np.int32),
  }
