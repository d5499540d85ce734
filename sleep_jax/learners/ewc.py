"""ewc: sft whose weights are held where the past depends on them.

Online EWC, one anchor, the empirical diagonal Fisher scaled to mean 1. The
base's own training data is not here; its Fisher is taken on documents that the
base generates. Of an adapter, anchor and Fisher are those of A and B; while B
is still zero, the Fisher of A is zero too.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from sleep_jax import array_typing as at
from sleep_jax.data import experience as experience_lib
from sleep_jax.learners import finetune
from sleep_jax.lifecycle import life as life_lib
from sleep_jax.lifecycle.consolidation import config as consolidation_config
from sleep_jax.lifecycle.consolidation import generation
from sleep_jax.training import fisher as fisher_lib
from sleep_jax.training import fit


@dataclasses.dataclass(frozen=True)
class EWCConfig(finetune.FinetunerConfig):
  """`sleep` says how the base's documents are sampled."""

  sleep: consolidation_config.SeedingConfig = (
    consolidation_config.SeedingConfig()
  )


def ewc_penalty(trainable: at.Tree, state: at.Tree) -> jax.Array:
  """lambda / 2 sum_j F_j (theta_j - theta*_j)^2 (Kirkpatrick et al. 2017)."""
  pulls = jax.tree.map(
    lambda p, a, f: (f * (p - a) ** 2).sum(),
    trainable,
    state['anchor'],
    state['fisher'],
  )
  return 0.5 * state['lambda'] * sum(jax.tree.leaves(pulls))


class EWC(finetune.Finetune):
  """Elastic weight consolidation; `learner_state`: anchor, Fisher, lambda."""

  name: ClassVar[str] = 'ewc'
  Config: ClassVar[type] = EWCConfig
  penalty = staticmethod(ewc_penalty)

  def init(self, rng: at.Key) -> life_lib.Life:
    setup, cfg, life = self.setup, self.cfg, super().init(rng)
    with setup.costs.phase('rollout') as cost:
      tokens, lengths, *_ = generation.sample_as_it_is(
        cfg.sleep,
        life.model.replace(adapter=None),  # One that changes nothing yet.
        setup.tokenizer,
        cfg.finetune.fisher_rows,
        rng,
      )
      cost.add_forward(tokens.size)
    inside = np.arange(tokens.shape[1]) < lengths[:, None]
    state = {
      'anchor': self._anchor(life),
      'fisher': self._fisher(life, tokens, inside.astype(np.float32)),
      'lambda': jnp.float32(cfg.finetune.ewc_lambda),
    }
    return life.replace(learner_state=state)

  def wake(
    self, life: life_lib.Life, experience: experience_lib.AnyExperience
  ) -> tuple[life_lib.Life, at.Metrics]:
    experience = experience_lib.in_memory(experience, self.name)
    life, metrics = super().wake(life, experience)
    cfg = self.cfg.finetune
    rows = np.linspace(0, len(experience.tokens) - 1, cfg.fisher_rows)
    rows = rows.astype(int)
    new = self._fisher(life, experience.tokens[rows], experience.weight[rows])
    state = life.learner_state | {
      'anchor': self._anchor(life),
      'fisher': jax.tree.map(
        lambda old, new: cfg.ewc_decay * old + new,
        life.learner_state['fisher'],
        new,
      ),
    }
    return life.replace(learner_state=state), metrics

  def _anchor(self, life: life_lib.Life) -> at.Tree:
    """A copy of what trains: the steps donate their buffers."""
    return jax.tree.map(jnp.array, fit.trainable(life.model))

  def _fisher(
    self, life: life_lib.Life, tokens: np.ndarray, weight: np.ndarray
  ) -> at.Tree:
    """The Fisher of these rows, scaled to mean 1."""
    with self.setup.costs.phase('wake') as cost:
      fisher = fisher_lib.diagonal_fisher(
        life.model.with_memory(None), jnp.asarray(tokens), jnp.asarray(weight)
      )
      fisher = jax.block_until_ready(fisher)
      cost.add_training(tokens.size, steps=0)
    size = sum(f.size for f in jax.tree.leaves(fisher))
    total = sum(f.sum() for f in jax.tree.leaves(fisher))
    return jax.tree.map(lambda f: f * size / total, fisher)
