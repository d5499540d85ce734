"""recurrent_training: a hybrid learns to sleep by recurrence (2605.26099).

Awake, all weights train by back-propagation through windows and passes; nights
change nothing.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.data import experience as experience_lib
from sleep_jax.data import windows as windows_lib
from sleep_jax.learners import base
from sleep_jax.lifecycle import life as life_lib
from sleep_jax.lifecycle.recurrence import config as recurrence_config
from sleep_jax.lifecycle.recurrence import halting
from sleep_jax.lifecycle.recurrence import training as training_lib
from sleep_jax.metrics import observation
from sleep_jax.models import model as model_lib
from sleep_jax.runtime import finite
from sleep_jax.runtime import sharding

_STEPS_PER_CALL = 20


@dataclasses.dataclass(frozen=True)
class RecurrentTrainingConfig:
  """Sections of the learner."""

  recurrence: recurrence_config.RecurrenceConfig = (
    recurrence_config.RecurrenceConfig()
  )
  training: recurrence_config.TrainingConfig = (
    recurrence_config.TrainingConfig()
  )


class RecurrentTraining(base.Learner):
  """Trains through windows; every episode has the same number of steps."""

  name: ClassVar[str] = 'recurrent_training'
  Config: ClassVar[type] = RecurrentTrainingConfig

  def batch_rows(self) -> dict[str, int]:
    return {'training.batch': self.cfg.training.batch}

  def check(self) -> None:
    super().check()
    training_lib.check(self.setup.model.cfg, self.cfg.recurrence)
    steps, episodes = self.cfg.training.steps, self.setup.episodes
    if steps % episodes:
      raise config.ConfigError(
        f'training.steps={steps} is not a multiple of task.episodes={episodes};'
        ' change one of them.'
      )

  def init(self, rng: at.Key) -> life_lib.Life:
    # The steps donate their buffers, and the base must outlive this life.
    model = jax.tree.map(jnp.array, self.setup.model)
    if self.cfg.recurrence.halting and 'halt' not in model.params:
      params = model.params | {'halt': halting.init_halting(model.cfg)}
      model = model.replace(params=params)
    optimizer = training_lib.optimizer(self.cfg.training)
    opt_state = sharding.init(optimizer.init, model.params)
    return life_lib.init_life(model, rng, opt_state=opt_state)

  def wake(
    self, life: life_lib.Life, experience: experience_lib.AnyExperience
  ) -> tuple[life_lib.Life, at.Metrics]:
    if not isinstance(experience, experience_lib.WindowStream):
      raise config.ConfigError(
        'learner recurrent_training needs a task with windows to train on, '
        'such as rule110, depo, symbolic or babilong_windows.'
      )
    cfg, night = self.cfg, int(life.clock.nights)
    steps = cfg.training.steps // self.setup.episodes
    batches = experience.batches(cfg.training.batch, _STEPS_PER_CALL)
    rng = np.random.default_rng([self.setup.seed, 2, night])
    choices = cfg.training.random_passes or (cfg.recurrence.passes,)
    state, losses = (life.model.with_memory(None), life.opt_state), []
    tokens = life.clock.tokens
    for first in range(0, steps, _STEPS_PER_CALL):
      num = min(_STEPS_PER_CALL, steps - first)
      recurrence = dataclasses.replace(
        cfg.recurrence, passes=int(rng.choice(choices))
      )
      rows = [next(batches) for _ in range(num)]
      state, loss = self._train(recurrence, state, rows, night * steps + first)
      losses.append(loss)
      tokens += num * _tokens_per_row(rows[0])
    model, opt_state = state
    life = life.replace(
      model=model.with_memory(life.memory),
      opt_state=opt_state,
      clock=life.clock.replace(tokens=tokens),
    )
    loss = np.concatenate(losses)
    last = float(loss[-_STEPS_PER_CALL:].mean())
    return life, {'loss': float(loss.mean()), 'loss_last': last}

  def _train(
    self,
    recurrence: recurrence_config.RecurrenceConfig,
    state: tuple[model_lib.Model, Any],
    rows: list[windows_lib.WindowBatch],
    first_step: int,
  ) -> tuple[tuple[model_lib.Model, Any], np.ndarray]:
    """One step per batch; the model, its optimizer state, and the losses."""
    batches = jax.tree.map(lambda *x: np.stack(x), *rows)
    with self.setup.costs.phase('wake') as cost:
      model, opt_state, loss = training_lib.train_steps(
        recurrence,
        self.cfg.training,
        *state,
        sharding.shard_batch(batches, None, 'batch'),
      )
      loss = jax.device_get(loss)
      size = len(rows) * self.cfg.training.batch
      forward = training_lib.forward_flops(model.cfg, recurrence, rows[0])
      cost.add(
        tokens=size * _tokens_per_row(rows[0]),
        flops=3.0 * size * forward,
        steps=len(rows),
      )
    finite.check_finite('training', loss, model.params, first_step=first_step)
    observation.steps({'loss': loss})
    return (model, opt_state), loss

  def predict(
    self,
    life: life_lib.Life,
    batch: windows_lib.WindowBatch,
    passes: int | None = None,
  ) -> experience_lib.WindowPredictions:
    recurrence = self.cfg.recurrence
    if passes is not None:
      recurrence = dataclasses.replace(recurrence, passes=passes)
    return base.predict_windows(
      recurrence, life.model.with_memory(None), batch, self.setup.costs
    )


def _tokens_per_row(batch: windows_lib.WindowBatch) -> int:
  """Tokens of one sequence, padding included."""
  _, num_windows, window = batch.context.shape
  return num_windows * window + batch.inputs.shape[1]
