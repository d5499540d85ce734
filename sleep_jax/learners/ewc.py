"""sleep_jax.learners.ewc."""

import jax
import jax.numpy as jnp
import numpy as np

from sleep_jax import array_typing as at
from sleep_jax.data import experience as experience_lib
from sleep_jax.learners import finetune
from sleep_jax.lifecycle import life as life_lib
from sleep_jax.lifecycle.consolidation import replay as replay_lib
from sleep_jax.training import fisher as fisher_lib


def ewc_penalty(params: at.Params, notes: at.Tree) -> jax.Array:
  """lambda / 2 sum_j F_j (theta_j - theta*_j)^2 (Kirkpatrick et al. 2017)."""
  pulls = jax.tree.map(
    lambda p, a, f: (f * (p - a) ** 2).sum(),
    params,
    notes['anchor'],
    notes['fisher'],
  )
  return 0.5 * notes['lambda'] * sum(jax.tree.leaves(pulls))


class EWC(finetune.Finetune):
  """ewc: sft that pulls each weight back by how much the past depends on it.

  Online EWC, one anchor, the empirical diagonal Fisher scaled to mean 1. The
  base's own past has no data here; its Fisher is taken on documents that the
  base samples from itself.
  """

  penalty = staticmethod(ewc_penalty)

  def init(self, rng: at.Key) -> life_lib.Life:
    s, life = self.setup, super().init(rng)
    with s.costs.phase('rollout') as account:
      tokens, lengths = replay_lib.sample(
        s.model,
        s.sleep,
        life.params,
        life.memory,
        s.tokenizer,
        s.finetune.fisher_rows,
        rng,
      )
      account.add_forward(tokens.size)
    inside = np.arange(tokens.shape[1]) < lengths[:, None]
    notes = {
      'anchor': jax.tree.map(jnp.array, life.params),
      'fisher': self._fisher(life, tokens, inside.astype(np.float32)),
      'lambda': jnp.float32(s.finetune.ewc_lambda),
    }
    return life.replace(notes=notes)

  def wake(
    self, life: life_lib.Life, experience: experience_lib.Experience
  ) -> tuple[life_lib.Life, at.Metrics]:
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

  def _fisher(self, life, tokens, weight) -> at.Params:
    s = self.setup
    with s.costs.phase('wake') as account:
      fisher = fisher_lib.diagonal_fisher(
        s.model, life.params, jnp.asarray(tokens), jnp.asarray(weight)
      )
      fisher = jax.block_until_ready(fisher)
      account.add_training(tokens.size, steps=0)
    size = sum(f.size for f in jax.tree.leaves(fisher))
    total = sum(f.sum() for f in jax.tree.leaves(fisher))
    return jax.tree.map(lambda f: f * size / total, fisher)
