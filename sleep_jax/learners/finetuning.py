"""Learners that change the backbone's weights: sft, ewc and joint."""

import jax
import jax.numpy as jnp
import numpy as np

from sleep_jax import training
from sleep_jax import typing as t
from sleep_jax.learners import learner
from sleep_jax.lifecycle import consolidation
from sleep_jax.lifecycle import dreams
from sleep_jax.lifecycle import life as life_lib
from sleep_jax.runtime import health
from sleep_jax.tasks import task


class Finetune:
  """sft: every weight trains on the stream as it comes, by AdamW."""

  penalty: training.Penalty | None = None

  def __init__(self, setup: learner.Setup):
    self.setup = setup
    self.optimizer = training.adamw(
      setup.finetune.learning_rate, setup.finetune.weight_decay
    )

  def init(self, rng: t.Key) -> life_lib.Life:
    # The steps donate their buffers, and the base must outlive this life.
    params = jax.tree.map(jnp.array, self.setup.params)
    return life_lib.born(
      self.setup.model, params, rng, opt_state=self.optimizer.init(params)
    )

  def wake(
    self, life: life_lib.Life, experience: task.Experience
  ) -> tuple[life_lib.Life, learner.Metrics]:
    s = self.setup
    tokens, weight = learner.batches(experience, s.finetune.batch)
    shape = (-1, s.finetune.batch, tokens.shape[1])
    with s.ledger.phase('wake') as account:
      params, opt_state, loss = training.train_steps(
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
      account.full(tokens.size, steps=loss.size)
    health.check('wake', loss, params)
    clock = life.clock.replace(
      tokens=life.clock.tokens + tokens.size // s.finetune.batch
    )
    life = life.replace(params=params, opt_state=opt_state, clock=clock)
    return life, {'loss': float(loss.mean()), 'loss_last': float(loss[-1])}

  def sleep(self, life: life_lib.Life) -> tuple[life_lib.Life, learner.Metrics]:
    return consolidation.awaken(life), {}

  def respond(self, life, prompts, answers) -> task.Response:
    return learner.score(self.setup, life.params, life.memory, prompts, answers)


def ewc_penalty(params: t.Params, notes: t.Tree) -> jax.Array:
  """lambda / 2 sum_j F_j (theta_j - theta*_j)^2 (Kirkpatrick et al. 2017)."""
  pulls = jax.tree.map(
    lambda p, a, f: (f * (p - a) ** 2).sum(),
    params,
    notes['anchor'],
    notes['fisher'],
  )
  return 0.5 * notes['lambda'] * sum(jax.tree.leaves(pulls))


class ElasticWeights(Finetune):
  """ewc: sft that pulls each weight back by how much the past depends on it.

  Online EWC, one anchor, the empirical diagonal Fisher scaled to mean 1. The
  base's own past has no data here; its Fisher is taken on documents that the
  base samples from itself.
  """

  penalty = staticmethod(ewc_penalty)

  def init(self, rng: t.Key) -> life_lib.Life:
    s, life = self.setup, super().init(rng)
    with s.ledger.phase('rollout') as account:
      tokens, lengths = dreams.sample(
        s.model,
        s.sleep,
        life.params,
        life.memory,
        s.tokenizer,
        s.finetune.fisher_rows,
        rng,
      )
      account.forward(tokens.size)
    inside = np.arange(tokens.shape[1]) < lengths[:, None]
    notes = {
      'anchor': jax.tree.map(jnp.array, life.params),
      'fisher': self._fisher(life, tokens, inside.astype(np.float32)),
      'lambda': jnp.float32(s.finetune.ewc_lambda),
    }
    return life.replace(notes=notes)

  def wake(
    self, life: life_lib.Life, experience: task.Experience
  ) -> tuple[life_lib.Life, learner.Metrics]:
    life, metrics = super().wake(life, experience)
    rows = np.linspace(
      0, len(experience.tokens) - 1, self.setup.finetune.fisher_rows
    ).astype(int)
    new = self._fisher(life, experience.tokens[rows], experience.weight[rows])
    decay = self.setup.finetune.ewc_decay
    notes = life.notes | {
      'anchor': jax.tree.map(jnp.array, life.params),
      'fisher': jax.tree.map(
        lambda old, new: decay * old + new, life.notes['fisher'], new
      ),
    }
    return life.replace(notes=notes), metrics

  def _fisher(self, life, tokens, weight) -> t.Params:
    s = self.setup
    with s.ledger.phase('wake') as account:
      fisher = training.diagonal_fisher(
        s.model, life.params, jnp.asarray(tokens), jnp.asarray(weight)
      )
      fisher = jax.block_until_ready(fisher)
      account.full(tokens.size, steps=0)
    size = sum(f.size for f in jax.tree.leaves(fisher))
    total = sum(f.sum() for f in jax.tree.leaves(fisher))
    return jax.tree.map(lambda f: f * size / total, fisher)


class Joint(Finetune):
  """joint: the upper bound, which may read the whole past again every day.

  Each day trains on as many tokens as the day brings, drawn evenly from all
  that the life has read so far.
  """

  def init(self, rng: t.Key) -> life_lib.Life:
    nothing = {'tokens': np.zeros((0, 0), np.int32), 'weight': np.zeros((0, 0))}
    return super().init(rng).replace(notes=nothing)

  def wake(
    self, life: life_lib.Life, experience: task.Experience
  ) -> tuple[life_lib.Life, learner.Metrics]:
    tokens, weight = experience.tokens, experience.weight
    if np.size(life.notes['tokens']):
      tokens = np.concatenate([np.asarray(life.notes['tokens']), tokens])
      weight = np.concatenate([np.asarray(life.notes['weight']), weight])
    rng = dreams.host_rng(jax.random.fold_in(life.rng, life.clock.nights))
    rows = rng.permutation(len(tokens))[: len(experience.tokens)]
    life, metrics = super().wake(
      life.replace(notes=None), task.Experience(tokens[rows], weight[rows])
    )
    return life.replace(notes={'tokens': tokens, 'weight': weight}), metrics
