"""Learners that change the backbone's weights: sft, ewc and joint."""

import dataclasses

import jax
import jax.numpy as jnp

from sleep_jax import array_typing as at
from sleep_jax.data import experience as experience_lib
from sleep_jax.data import padding
from sleep_jax.inference import scoring
from sleep_jax.learners import base as learner_lib
from sleep_jax.lifecycle import life as life_lib
from sleep_jax.runtime import finite
from sleep_jax.training import fit
from sleep_jax.training import optimizers


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
  """How the baselines that change the backbone's weights train."""

  batch: int = 8  # Rows of a step.
  learning_rate: float = 1e-3
  weight_decay: float = 0.0
  ewc_lambda: float = 1e3  # Pull per unit of normalised Fisher information.
  ewc_decay: float = 1.0  # gamma of online EWC: F <- gamma F + F_new.
  fisher_rows: int = 128  # Rows whose gradients make an episode's Fisher.


class Finetune:
  """sft: every weight trains on the stream as it comes, by AdamW."""

  penalty: fit.Penalty | None = None

  def __init__(self, setup: learner_lib.Setup):
    self.setup = setup
    self.optimizer = optimizers.adamw(
      setup.finetune.learning_rate, setup.finetune.weight_decay
    )

  def init(self, rng: at.Key) -> life_lib.Life:
    # The steps donate their buffers, and the base must outlive this life.
    params = jax.tree.map(jnp.array, self.setup.params)
    return life_lib.init_life(
      self.setup.model, params, rng, opt_state=self.optimizer.init(params)
    )

  def wake(
    self, life: life_lib.Life, experience: experience_lib.Experience
  ) -> tuple[life_lib.Life, at.Metrics]:
    s = self.setup
    tokens, weight = padding.pad_to_batches(experience, s.finetune.batch)
    shape = (-1, s.finetune.batch, tokens.shape[1])
    with s.costs.phase('wake') as account:
      params, opt_state, loss = fit.train_steps(
        s.model,
        self.optimizer,
        life.params,
        life.opt_state,
        tokens.reshape(shape),
        weight.reshape(shape),
        penalty=self.penalty,
        penalty_state=life.notes,
      )
      loss = jax.block_until_ready(loss)
      account.add_training(tokens.size, steps=loss.size)
    finite.check_finite('wake', loss, params)
    clock = life.clock.replace(
      tokens=life.clock.tokens + tokens.size // s.finetune.batch
    )
    life = life.replace(params=params, opt_state=opt_state, clock=clock)
    return life, {'loss': float(loss.mean()), 'loss_last': float(loss[-1])}

  def sleep(self, life: life_lib.Life) -> tuple[life_lib.Life, at.Metrics]:
    return life_lib.end_night(life), {}

  def respond(self, life, prompts, answers) -> experience_lib.Response:
    return scoring.score(self.setup, life.params, life.memory, prompts, answers)
