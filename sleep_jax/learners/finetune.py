"""sft: every weight of the backbone trains on the stream as it comes."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sleep_jax import array_typing as at
from sleep_jax.data import experience as experience_lib
from sleep_jax.data import padding
from sleep_jax.learners import base
from sleep_jax.lifecycle import life as life_lib
from sleep_jax.runtime import finite
from sleep_jax.training import fit
from sleep_jax.training import optimizers

_STEPS_PER_CALL = 20  # Of a stream that is not in memory.


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
  """How learners that change the backbone's weights train."""

  batch: int = 8  # Rows of a step.
  learning_rate: float = 1e-3
  # Steps of a warm-up and a cosine decay to zero, as in pretraining; 0 = the
  # rate is constant.
  warmup_cosine_steps: int = 0
  weight_decay: float = 0.0
  ewc_lambda: float = 1e3  # Penalty per unit of normalised Fisher information.
  ewc_decay: float = 1.0  # gamma of online EWC: F <- gamma F + F_new.
  fisher_rows: int = 128  # Rows whose gradients make an episode's Fisher.

  def schedule(self) -> optax.ScalarOrSchedule:
    """The learning rate, over the steps of a life."""
    steps = self.warmup_cosine_steps
    if not steps:
      return self.learning_rate
    warmup = min(200, steps // 10)
    return optax.warmup_cosine_decay_schedule(
      0.0, self.learning_rate, warmup, steps
    )


@dataclasses.dataclass(frozen=True)
class FinetunerConfig:
  """Sections of the learners sft, ewc and joint."""

  finetune: FinetuneConfig = FinetuneConfig()


class Finetune(base.Learner):
  """Supervised fine-tuning by AdamW."""

  name: ClassVar[str] = 'sft'
  Config: ClassVar[type] = FinetunerConfig
  penalty: fit.Penalty | None = None

  def __init__(self, cfg: FinetunerConfig, setup: base.Setup):
    super().__init__(cfg, setup)
    self.optimizer = optimizers.adamw(
      cfg.finetune.schedule(), cfg.finetune.weight_decay
    )

  def batch_rows(self) -> dict[str, int]:
    return {'finetune.batch': self.cfg.finetune.batch}

  def init(self, rng: at.Key) -> life_lib.Life:
    # The steps donate their buffers, and the base must outlive this life.
    model = jax.tree.map(jnp.array, self.setup.model)
    opt_state = self.optimizer.init(model.params)
    return life_lib.init_life(model, rng, opt_state=opt_state)

  def wake(
    self, life: life_lib.Life, experience: experience_lib.AnyExperience
  ) -> tuple[life_lib.Life, at.Metrics]:
    stream = experience_lib.row_stream(experience, self.name)
    batch, losses, size = self.cfg.finetune.batch, [], 0
    for block in stream.blocks(_STEPS_PER_CALL * batch):
      tokens, weight = padding.pad_to_batches(block[0], block[1], batch)
      life, loss = self._train(life, tokens, weight)
      losses.append(loss)
      size += tokens.size
    clock = life.clock.replace(tokens=life.clock.tokens + size // batch)
    life = life.replace(clock=clock)
    loss = np.concatenate(losses)
    return life, {'loss': float(loss.mean()), 'loss_last': float(loss[-1])}

  def _train(
    self, life: life_lib.Life, tokens: jax.Array, weight: jax.Array
  ) -> tuple[life_lib.Life, np.ndarray]:
    """A step per batch of rows; the loss of each."""
    shape = (-1, self.cfg.finetune.batch, tokens.shape[1])
    with self.setup.costs.phase('wake') as cost:
      model, opt_state, loss = fit.train_steps(
        self.optimizer,
        life.model.with_memory(None),
        life.opt_state,
        tokens.reshape(shape),
        weight.reshape(shape),
        penalty=self.penalty,
        penalty_state=life.learner_state,
      )
      loss = jax.block_until_ready(loss)
      cost.add_training(tokens.size, steps=loss.size)
    finite.check_finite('wake', loss, model.params)
    model = model.with_memory(life.memory)
    return life.replace(model=model, opt_state=opt_state), np.asarray(loss)
