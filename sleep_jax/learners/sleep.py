"""sleep: wake, then consolidate, then dream (Language Models Need Sleep).

Awake, a life reads by Eq. 2's updates, or a hybrid by passes over its windows
(`wake.reads`). Asleep, `consolidation.night` moves what is due into slower
levels, then `dreaming.night` improves on the day's contexts; a day without
contexts has no dreams. With `sleep.consolidate` false nothing moves at night.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.data import contexts
from sleep_jax.data import experience as experience_lib
from sleep_jax.data import packing
from sleep_jax.data import padding
from sleep_jax.learners import base
from sleep_jax.learners import checks
from sleep_jax.learners import self_edit
from sleep_jax.lifecycle import archive as archive_lib
from sleep_jax.lifecycle import life as life_lib
from sleep_jax.lifecycle import schedule
from sleep_jax.lifecycle import wake as wake_lib
from sleep_jax.lifecycle.consolidation import night as consolidation_night
from sleep_jax.lifecycle.consolidation import rehearsal
from sleep_jax.lifecycle.dreaming import study as study_lib
from sleep_jax.lifecycle.recurrence import config as recurrence_config
from sleep_jax.lifecycle.recurrence import training as recurrent_training
from sleep_jax.metrics import observation
from sleep_jax.runtime import finite
from sleep_jax.runtime import sharding

_BASE_KEY = 2**31 - 1  # Of a life's key; nights and tokens have the others.


@dataclasses.dataclass(frozen=True)
class SleepConfig(self_edit.SelfEditConfig):
  """Sections of the learner: a day, a night, its dreams."""

  wake: wake_lib.WakeConfig = wake_lib.WakeConfig()
  recurrence: recurrence_config.RecurrenceConfig = (
    recurrence_config.RecurrenceConfig()
  )


class Sleep(base.Learner):
  """The method, and by its settings its ablations.

  `learner_state['window']`, of one that reads windows, is the last window of
  the day, `[1 or 0, 2, L]`: tokens and their mask. It is read at night.
  """

  name: ClassVar[str] = 'sleep'
  Config: ClassVar[type] = SleepConfig

  def __init__(self, cfg: SleepConfig, setup: base.Setup):
    super().__init__(cfg, setup)
    self.dreamer = None
    if setup.format is not None:
      self.dreamer = self_edit.build_dreamer(cfg, setup)

  @property
  def trains_backbone(self) -> bool:
    """Dreams alone may go into the backbone, where their target is `fold`."""
    return self.dreamer is not None and self_edit.folds(self.dreamer)

  @property
  def reads_windows(self) -> bool:
    """Whether the day is read by passes over windows."""
    return self.cfg.wake.reads == 'windows'

  def batch_rows(self) -> dict[str, int]:
    wake, rows = self.cfg.wake, {}
    if not self.reads_windows:
      rows['wake.batch'] = wake.batch
    if wake.rehearsed:
      rows['wake.rehearsed'] = wake.rehearsed
    if self.cfg.sleep.consolidate:
      rows |= checks.seeding_rows(self.cfg.sleep)
    return rows

  def check(self) -> None:
    super().check()
    model, cfg = self.setup.model.cfg, self.cfg
    if cfg.sleep.consolidate:
      study_nights = int(self.dreamer is not None and cfg.dreaming.study_night)
      checks.check_slots(model, cfg.sleep, self.setup.episodes + study_nights)
      checks.check_judge(cfg.sleep)
    if cfg.wake.rehearsed and not (cfg.sleep.consolidate and cfg.sleep.archive):
      raise config.ConfigError(
        f'wake.rehearsed={cfg.wake.rehearsed} dreams an update, but none are '
        'kept; set sleep.consolidate=True and sleep.archive, or '
        'wake.rehearsed=0.'
      )
    if not self.reads_windows:
      schedule.base_chunk(model, cfg.wake.window or self.setup.row_length)
      return
    recurrent_training.check(model, cfg.recurrence)
    if cfg.recurrence.eviction != 'hard':
      raise config.ConfigError(
        f'recurrence.eviction={cfg.recurrence.eviction!r}: a life keeps no '
        "keys from day to day; use recurrence.eviction='hard'."
      )
    if cfg.sleep.consolidate:
      schedule.transfer_of_states(model)

  def init(self, rng: at.Key) -> life_lib.Life:
    life = super().init(rng)
    if self.reads_windows:
      state = {'window': jnp.zeros((0, 2, 0), jnp.int32)}
      life = life.replace(learner_state=state)
    if self.cfg.sleep.archive:
      cfg = self.cfg.sleep
      empty = archive_lib.empty(cfg.dream_length, cfg.teacher_top_k)
      life = life.replace(archive=empty)
    if self.dreamer is not None:
      life = self_edit.init_adapter(self.dreamer, life)
    return life

  def wake(
    self, life: life_lib.Life, experience: experience_lib.AnyExperience
  ) -> tuple[life_lib.Life, at.Metrics]:
    experience = experience_lib.in_memory(experience, self.name)
    life = self._with_dreams_of_base(life, experience.frames)
    if self.reads_windows:
      life, metrics = self._read_windows(life, experience)
    else:
      life, metrics = self._read_rows(life, experience)
    life = life.replace(contexts=experience.contexts)
    return life.with_frames(experience.frames), metrics

  def _with_dreams_of_base(
    self, life: life_lib.Life, frames: tuple[experience_lib.Frame, ...]
  ) -> life_lib.Life:
    """Before anything was read: the life with its first archive, if any."""
    cfg, setup = self.cfg.sleep, self.setup
    if not cfg.archive_base or int(life.clock.tokens):
      return life
    archive = rehearsal.of_base(
      cfg,
      life.model.merged(),
      setup.tokenizer,
      setup.costs,
      jax.random.fold_in(life.rng, _BASE_KEY),
      frames,
    )
    return life.replace(archive=archive)

  def sleep(self, life: life_lib.Life) -> tuple[life_lib.Life, at.Metrics]:
    cfg, setup = self.cfg, self.setup
    life = self._flush_window(life)
    life, metrics = consolidation_night.night(
      cfg.sleep, life, self.due(life), setup.tokenizer, setup.costs
    )
    if self.dreamer is not None:
      life, dreaming_metrics = self_edit.dream(self.dreamer, life)
      metrics |= dreaming_metrics
    return life_lib.end_night(life), metrics

  def study(
    self, life: life_lib.Life, requests: list[contexts.StudyRequest]
  ) -> experience_lib.Answers:
    """Instances are trained on the life's own dreams about the contexts.

    With `dreaming.study_night` a copy of the life first reads the contexts,
    and has a night; with dreaming disabled that is all there is.
    """
    form, dreamer = self.setup.required_format(self.name), self.dreamer
    assert dreamer is not None  # It comes with the format.
    dreaming = self.cfg.dreaming
    models, keys = [], []
    for i, request in enumerate(requests):
      copy = life
      if dreaming.study_night:
        rows = study_lib.context_rows(form, request)
        copy = self._after_a_night(life, rows, i)
      models.append(copy.model)
      keys.append(copy.rng)
    if not dreaming.enabled:
      return [
        [self._answer(model, request)] * request.attempts
        for model, request in zip(models, requests, strict=True)
      ]
    if not dreaming.study_night:
      key = jax.random.fold_in(life.rng, life.clock.nights)
      rows = [
        study_lib.dreamed_rows(
          dreamer, life.model, request, jax.random.fold_in(key, i)
        )
        for i, request in enumerate(requests)
      ]
      return study_lib.train_and_answer(
        dreamer, life.model, requests, rows, key
      )
    answers = []
    for model, key, request in zip(models, keys, requests, strict=True):
      rows = study_lib.dreamed_rows(dreamer, model, request, key)
      answers += study_lib.train_and_answer(
        dreamer, model, [request], [rows], key
      )
    return answers

  def _after_a_night(
    self, life: life_lib.Life, rows: contexts.TrainingRows, number: int
  ) -> life_lib.Life:
    """A copy of the life that has read `study_rows` of the rows, and slept."""
    index = np.resize(np.arange(len(rows.tokens)), self.cfg.dreaming.study_rows)
    copy = life.replace(rng=jax.random.fold_in(life.rng, 1 + number))
    copy, _ = self.wake(
      copy, experience_lib.Experience(rows.tokens[index], rows.weight[index])
    )
    return self.sleep(copy)[0]

  def due(self, life: life_lib.Life) -> list[schedule.Transfer]:
    """Tonight's transfers."""
    model = self.setup.model.cfg
    if not self.cfg.sleep.consolidate:
      return []
    if self.reads_windows:
      return [schedule.transfer_of_states(model)]
    clock = life.clock
    return schedule.transfers(
      model, int(clock.tokens_at_last_sleep), int(clock.tokens)
    )

  def _read_rows(
    self, life: life_lib.Life, experience: experience_lib.Experience
  ) -> tuple[life_lib.Life, at.Metrics]:
    """Eq. 2 over the day's rows."""
    cfg = self.cfg.wake
    if cfg.window:
      pad = self.setup.tokenizer.pad
      experience = packing.repack(experience, cfg.window, pad)
    tokens, weight = padding.pad_to_batches(
      experience.tokens, experience.weight, cfg.batch
    )
    chunk = schedule.base_chunk(self.setup.model.cfg, tokens.shape[1])
    with self.setup.costs.phase('wake') as cost:
      dreams = wake_lib.draw_rehearsed(
        cfg,
        life.archive,
        tokens.size // (cfg.batch * chunk),
        jax.random.fold_in(life.rng, life.clock.tokens),
        self.setup.tokenizer if self.cfg.sleep.splice else None,
      )
      memory, clock, loss = wake_lib.read_day(
        cfg,
        life.model.merged(),
        life.clock.tokens,
        tokens,
        weight,
        dreams,
        defer_due_update=self.cfg.sleep.consolidate,
      )
      loss = jax.block_until_ready(loss)
      rehearsed = 0 if dreams is None else dreams.tokens.size
      cost.add_online(tokens.size + rehearsed, steps=loss.size)
      if cfg.contradicted < 1.0:  # Half of the dreams, by two models.
        cost.add_forward(rehearsed // 2, times=2)
    finite.check_finite('wake', loss, memory)
    observation.steps({'loss': sharding.fetch(loss)})
    tenth = max(1, loss.size // 10)
    life = life.with_memory(memory)
    return life.replace(clock=life.clock.replace(tokens=clock)), {
      'loss_first': float(loss[:tenth].mean()),
      'loss_last': float(loss[-tenth:].mean()),
      'loss': float(loss.mean()),
    }

  def _read_windows(
    self, life: life_lib.Life, experience: experience_lib.Experience
  ) -> tuple[life_lib.Life, at.Metrics]:
    """Passes over all windows of the day but the last, which waits."""
    tokens = experience.tokens
    mask = (experience.weight > 0) | (tokens == self.setup.tokenizer.bos)
    windows = np.stack([tokens, mask.astype(tokens.dtype)], axis=1)
    waiting = life.learner_state['window']
    if waiting.size:  # Of a day without a night.
      windows = np.concatenate([waiting, windows])
    life = self._process_windows(life, jnp.asarray(windows[:-1]))
    clock = life.clock.replace(tokens=life.clock.tokens + tokens.size)
    state = {'window': jnp.asarray(windows[-1:])}
    return life.replace(learner_state=state, clock=clock), {}

  def _process_windows(
    self, life: life_lib.Life, windows: jax.Array
  ) -> life_lib.Life:
    """N passes over each window, after which its keys are dropped."""
    if not windows.size:
      return life
    cfg, layers = self.cfg.recurrence, life.model.cfg.layers
    with self.setup.costs.phase('wake') as cost:
      memory = wake_lib.read_windows(
        cfg, life.model.merged(), windows[:, 0], windows[:, 1] > 0
      )
      memory = jax.block_until_ready(memory)
      looped = len(cfg.looped_layers(layers)) / layers
      cost.add_forward(windows[:, 0].size * (1 + (cfg.passes - 1) * looped))
    finite.check_finite('wake', jnp.zeros((1,)), memory)
    return life.with_memory(memory)

  def _flush_window(self, life: life_lib.Life) -> life_lib.Life:
    """Reads the window that waits, if any, like the others."""
    if not self.reads_windows:
      return life
    window = life.learner_state['window']
    life = self._process_windows(life, window)
    return life.replace(learner_state={'window': window[:0]})
