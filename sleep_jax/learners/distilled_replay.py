"""distilled_replay: sft on the day, and distillation of archived documents.

Dark experience replay (arXiv 2004.07211) in which the documents are those that
the model itself wrote on each evening: the archive of the learner sleep, and
its rule for what a day contradicts, without fast weights, experts and nights.
A day trains all weights.
"""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.data import experience as experience_lib
from sleep_jax.data import order as order_lib
from sleep_jax.data import padding
from sleep_jax.learners import finetune
from sleep_jax.lifecycle import archive as archive_lib
from sleep_jax.lifecycle import life as life_lib
from sleep_jax.lifecycle import wake as wake_lib
from sleep_jax.lifecycle.consolidation import config as consolidation_config
from sleep_jax.lifecycle.consolidation import rehearsal
from sleep_jax.lifecycle.consolidation import replay as replay_lib
from sleep_jax.lifecycle.consolidation import teacher_labels
from sleep_jax.metrics import observation
from sleep_jax.models import model as model_lib
from sleep_jax.runtime import finite
from sleep_jax.runtime import sharding
from sleep_jax.training import fit
from sleep_jax.training import loss as loss_lib

_CHECKED = 64  # Archived rows that are read at a time.
# Beside the key of the day's order, which `finetune` takes.
_REHEARSAL_KEY, _EVENING_KEY, _ARCHIVE_KEY, _BASE_KEY = range(1, 5)


@dataclasses.dataclass(frozen=True)
class DistilledReplayConfig(finetune.FinetunerConfig):
  """The sections that say the same to the learner sleep.

  `wake`: how many documents a step rehearses beside `finetune.batch` rows of
  the day, and what the day contradicts. `sleep`: how documents are sampled and
  archived; half of `sleep.dreams` are, every evening.
  """

  wake: wake_lib.WakeConfig = wake_lib.WakeConfig()
  sleep: consolidation_config.SeedingConfig = (
    consolidation_config.SeedingConfig()
  )

  def __post_init__(self):
    for name, value in (
      ('wake.rehearsed', self.wake.rehearsed),
      ('sleep.archive', self.sleep.archive),
    ):
      if not value:
        raise config.ConfigError(
          f'{name}=0: learner distilled_replay rehearses archived documents; '
          'set it, or take learner replay or sft.'
        )


class DistilledReplay(finetune.Finetune):
  """Fine-tuning beside what the model predicted on earlier evenings."""

  name: ClassVar[str] = 'distilled_replay'
  Config: ClassVar[type] = DistilledReplayConfig

  def batch_rows(self) -> dict[str, int]:
    return super().batch_rows() | {'wake.rehearsed': self.cfg.wake.rehearsed}

  def check(self) -> None:
    super().check()
    if not self.trains_backbone:
      raise config.ConfigError(
        'finetune.target=lora: learner distilled_replay trains all weights; '
        'use finetune.target=all.'
      )

  def init(self, rng: at.Key) -> life_lib.Life:
    life, cfg, setup = super().init(rng), self.cfg.sleep, self.setup
    archive = archive_lib.empty(cfg.dream_length, cfg.teacher_top_k)
    if cfg.archive_base:
      key = jax.random.fold_in(rng, _BASE_KEY)
      archive = rehearsal.of_base(
        *(cfg, life.model.merged(), setup.tokenizer, setup.costs, key), day=()
      )
    return life.replace(archive=archive)

  def wake(
    self, life: life_lib.Life, experience: experience_lib.AnyExperience
  ) -> tuple[life_lib.Life, at.Metrics]:
    day = experience_lib.in_memory(experience, self.name)
    # A copy: training donates the weights of the morning.
    morning = jax.tree.map(jnp.array, life.model.merged())
    tokens, weight = self._steps(life, day)
    life = life.with_frames(day.frames)
    life, loss = self._read(life, morning, tokens, weight)
    size = tokens.size // self.cfg.finetune.batch
    clock = life.clock.replace(tokens=life.clock.tokens + size)
    life = self._write_down(life.replace(clock=clock), morning)
    return life, {'loss': float(loss.mean()), 'loss_last': float(loss[-1])}

  def _steps(
    self, life: life_lib.Life, day: experience_lib.Experience
  ) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and weights of all passes over the day, `[K, B, T]`."""
    batch = self.cfg.finetune.batch
    passes = [
      padding.pad_to_batches(*rows, batch) for rows in self._blocks(life, day)
    ]
    shape = -1, batch, passes[0][0].shape[1]
    tokens, weight = (
      np.concatenate(x).reshape(shape) for x in zip(*passes, strict=True)
    )
    return tokens, weight

  def _read(
    self,
    life: life_lib.Life,
    morning: model_lib.Model,
    tokens: np.ndarray,
    weight: np.ndarray,
  ) -> tuple[life_lib.Life, np.ndarray]:
    """All steps of a day; what it contradicts is dropped at midday."""
    documents = wake_lib.draw_rehearsed(
      self.cfg.wake,
      life.archive,
      len(tokens),
      self._key(life, _REHEARSAL_KEY),
      self.setup.tokenizer if self.cfg.sleep.splice else None,
    )
    if documents is None:
      return self._train_beside(life, tokens, weight, None)
    half, losses = len(tokens) // 2, []
    for part in (slice(0, half), slice(half, None)):
      rehearsed = jax.tree.map(lambda x, part=part: x[part], documents)
      if part.start:
        rehearsed = self._uncontradicted(
          self.cfg.wake.contradicted, morning, life.model.merged(), rehearsed
        )
      life, loss = self._train_beside(
        life, tokens[part], weight[part], rehearsed
      )
      losses.append(loss)
    return life, np.concatenate(losses)

  def _train_beside(
    self,
    life: life_lib.Life,
    tokens: np.ndarray,
    weight: np.ndarray,
    documents: archive_lib.Archive | None,
  ) -> tuple[life_lib.Life, np.ndarray]:
    """A step per row of the arguments; the day's loss before each."""
    with self.setup.costs.phase('wake') as cost:
      model, opt_state, loss = train_steps(
        self.optimizer,
        life.model.with_memory(None),
        life.opt_state,
        (jnp.asarray(tokens), jnp.asarray(weight), documents),
      )
      loss = jax.block_until_ready(loss)
      rehearsed = 0 if documents is None else documents.tokens.size
      cost.add_training(tokens.size + rehearsed, steps=loss.size)
    finite.check_finite('wake', loss, model.params)
    loss = np.asarray(loss)
    observation.steps({'loss': loss})
    model = model.with_memory(life.memory)
    return life.replace(model=model, opt_state=opt_state), loss

  def _uncontradicted(
    self,
    threshold: float,
    morning: model_lib.Model,
    now: model_lib.Model,
    documents: archive_lib.Archive,
  ) -> archive_lib.Archive:
    """`wake.uncontradicted` of documents `[K, R, ...]`."""
    if threshold == 1.0:
      return documents
    with self.setup.costs.phase('wake') as cost:
      group = jax.tree.map(lambda x: x[None], documents)
      kept = _uncontradicted(threshold, morning, now, group)
      cost.add_forward(documents.tokens.size, times=2)
    return jax.tree.map(lambda x: x[0], kept)

  def _write_down(
    self, life: life_lib.Life, morning: model_lib.Model
  ) -> life_lib.Life:
    """The life after it has archived what it learnt since the morning."""
    cfg, setup, model = self.cfg.sleep, self.setup, life.model.merged()
    archive, rows = life.archive, cfg.dreams // 2
    assert archive is not None
    if size := len(archive):
      groups = padding.groups(archive, _CHECKED)
      kept = self._uncontradicted(cfg.contradicted, morning, model, groups)
      weight = kept.weight.reshape(-1, archive.tokens.shape[1])[:size]
      archive = archive.replace(weight=weight)
    with setup.costs.phase('rollout') as cost:
      drawn = replay_lib.sample_new(
        *(cfg, (model, morning), setup.tokenizer, rows),
        *(self._key(life, _EVENING_KEY), life.frames),
      )
      times = 1 if cfg.oversample == 1 else 3 * cfg.oversample
      cost.add_forward(drawn.tokens.size, times=times)
    observation.documents('in the evening', drawn.tokens, drawn.lengths)
    with setup.costs.phase('teacher') as cost:
      teachers = replay_lib.Teachers(model, previous_memory=None)
      labels = teacher_labels.label_all(
        cfg, teachers, replay_lib.of_one_teacher(cfg, drawn)
      )
      night = int(life.clock.nights)
      new = teacher_labels.as_archive(labels, None, night)
      cost.add_forward(drawn.tokens.size)
    archive = archive_lib.extend(
      archive,
      new,
      cfg.archive,
      order_lib.numpy_rng(self._key(life, _ARCHIVE_KEY)),
      keep_base=cfg.archive_keeps_base,
    )
    return life.replace(archive=sharding.replicate(archive))

  def _key(self, life: life_lib.Life, number: int) -> at.Key:
    key = jax.random.fold_in(life.rng, life.clock.nights)
    return jax.random.fold_in(key, number)


_uncontradicted = jax.jit(wake_lib.uncontradicted, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def train_steps(
  optimizer: optax.GradientTransformation,
  model: model_lib.Model,
  opt_state: Any,
  batches: tuple[jax.Array, jax.Array, archive_lib.Archive | None],
) -> tuple[model_lib.Model, Any, at.Float[jax.Array, 'K']]:
  """K steps on rows of the day, and on documents by KL(teacher || model).

  Args:
    optimizer: of the weights (static).
    model: without memory and adapter; its weights are donated.
    opt_state: donated.
    batches: tokens and weights `[K, B, T]`, and documents `[K, R, ...]`, each
      of which counts as much as a row.

  Returns:
    Model, optimizer state, and the loss of each step's rows in nats per token,
    taken before its update.
  """

  def loss_fn(tree, batch):
    tokens, weight, documents = batch
    changed = fit.with_trainable(model, tree)
    loss = loss_lib.next_token_loss(changed, tokens, weight)
    total = loss
    if documents is not None:
      share = len(documents) / len(tokens)
      total += share * wake_lib.kl_of_archived(changed, documents)
    return total, loss

  tree, opt_state, loss = fit.fit(
    loss_fn,
    optimizer,
    fit.trainable(model),
    opt_state,
    sharding.shard_batch(batches, None, 'batch'),
  )
  return fit.with_trainable(model, tree), opt_state, loss
