"""sft: the backbone, or an adapter beside it, trains on the stream it reads."""

from collections.abc import Iterator
import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.data import experience as experience_lib
from sleep_jax.data import order as order_lib
from sleep_jax.data import padding
from sleep_jax.learners import base
from sleep_jax.lifecycle import life as life_lib
from sleep_jax.metrics import observation
from sleep_jax.models import lora as lora_lib
from sleep_jax.runtime import finite
from sleep_jax.runtime import sharding
from sleep_jax.training import fit
from sleep_jax.training import optimizers

_STEPS_PER_CALL = 20  # Of a stream that is not in memory.


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
  """How learners that change the backbone's weights train."""

  # What trains: all weights, or, with the backbone frozen, an adapter as the
  # section `lora` describes it.
  target: str = 'all'
  batch: config.Count = 8  # Rows of a step.
  # How often a day is read: first in its order, then in random ones.
  passes: config.Count = 1
  learning_rate: float = 1e-3
  # adamw, or muon: that for matrices inside the blocks, and AdamW at a quarter
  # of the rate for the rest.
  optimizer: str = 'adamw'
  # Steps of a warm-up and a cosine decay to zero, as in pretraining; 0 = the
  # rate is constant.
  warmup_cosine_steps: int = 0
  weight_decay: float = 0.0
  ewc_lambda: float = 1e3  # Penalty per unit of normalised Fisher information.
  ewc_decay: config.Fraction = 1.0  # gamma of online EWC: F <- gamma F + F_new.
  # Rows whose gradients make an episode's Fisher.
  fisher_rows: config.Count = 128

  def __post_init__(self):
    config.lookup(self.target, {'all': 0, 'lora': 0}, 'finetune.target')
    known = {'adamw': 0, 'muon': 0}
    config.lookup(self.optimizer, known, 'finetune.optimizer')
    if self.optimizer == 'muon' and self.target == 'lora':
      raise config.ConfigError(
        'finetune.optimizer=muon trains matrices inside the blocks, and '
        'finetune.target=lora leaves them as they are; use adamw.'
      )

  def build_optimizer(self) -> optax.GradientTransformation:
    """Of what trains."""
    if self.optimizer == 'adamw':
      return optimizers.adamw(self.schedule(), self.weight_decay)
    return optimizers.muon_adamw(
      self.schedule(), self.schedule(0.25), self.weight_decay
    )

  def schedule(self, share: float = 1.0) -> optax.ScalarOrSchedule:
    """A share of the learning rate, over the steps of a life."""
    peak, steps = share * self.learning_rate, self.warmup_cosine_steps
    if not steps:
      return peak
    warmup = min(200, steps // 10)
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps)


@dataclasses.dataclass(frozen=True)
class FinetunerConfig:
  """Sections of the learners sft, ewc, joint and replay."""

  finetune: FinetuneConfig = FinetuneConfig()
  lora: lora_lib.LoraConfig = lora_lib.LoraConfig()


class Finetune(base.Learner):
  """Supervised fine-tuning by AdamW."""

  name: ClassVar[str] = 'sft'
  Config: ClassVar[type] = FinetunerConfig
  penalty: fit.Penalty | None = None

  def __init__(self, cfg: FinetunerConfig, setup: base.Setup):
    super().__init__(cfg, setup)
    self.optimizer = cfg.finetune.build_optimizer()

  def batch_rows(self) -> dict[str, int]:
    return {'finetune.batch': self.cfg.finetune.batch}

  @property
  def trains_backbone(self) -> bool:
    return self.cfg.finetune.target == 'all'

  def check(self) -> None:
    super().check()
    mixers = self.setup.model.cfg.mixers
    if not self.trains_backbone and mixers:
      raise config.ConfigError(
        f'finetune.target=lora: a model with model.mixers={mixers} takes no '
        'adapter; use finetune.target=all.'
      )

  def init(self, rng: at.Key) -> life_lib.Life:
    model = self.setup.model
    if not self.trains_backbone:
      adapter = lora_lib.init_adapter(
        model.cfg, self.cfg.lora, model.params, jax.random.fold_in(rng, 0)
      )
      model = model.replace(adapter=adapter)
    else:
      # The steps donate their buffers, and the base must outlive this life.
      model = jax.tree.map(jnp.array, model)
    opt_state = sharding.init(self.optimizer.init, fit.trainable(model))
    return life_lib.init_life(model, rng, opt_state=opt_state)

  def wake(
    self, life: life_lib.Life, experience: experience_lib.AnyExperience
  ) -> tuple[life_lib.Life, at.Metrics]:
    batch, losses, size = self.cfg.finetune.batch, [], 0
    for rows in self._blocks(life, experience):
      tokens, weight = padding.pad_to_batches(*rows, batch)
      life, loss = self._train(life, tokens, weight)
      losses.append(loss)
      size += tokens.size
    clock = life.clock.replace(tokens=life.clock.tokens + size // batch)
    life = life.replace(clock=clock).with_frames(experience.frames)
    loss = np.concatenate(losses)
    return life, {'loss': float(loss.mean()), 'loss_last': float(loss[-1])}

  def _blocks(
    self, life: life_lib.Life, experience: experience_lib.AnyExperience
  ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokens and weights of what the day trains on, block by block.

    Args:
      life: as the day begins; of use before the first block alone, as
        training donates its weights.
      experience: the day's.
    """
    cfg = self.cfg.finetune
    stream = experience_lib.row_stream(experience, self.name)
    if cfg.passes > 1:
      stream = experience_lib.in_memory(stream, self.name)
    order = order_lib.numpy_rng(jax.random.fold_in(life.rng, life.clock.nights))
    yield from stream.blocks(_STEPS_PER_CALL * cfg.batch)
    for _ in range(cfg.passes - 1):
      for tokens, weight in stream.blocks(_STEPS_PER_CALL * cfg.batch):
        rows = order.permutation(len(tokens))
        yield tokens[rows], weight[rows]

  def _train(
    self, life: life_lib.Life, tokens: jax.Array, weight: jax.Array
  ) -> tuple[life_lib.Life, np.ndarray]:
    """A step per batch of rows; the loss of each."""
    shape = (-1, self.cfg.finetune.batch, tokens.shape[1])
    batches = tokens.reshape(shape), weight.reshape(shape)
    # What else a learner keeps may grow, and would compile the steps again.
    state = life.learner_state if self.penalty else None
    penalty = dict(penalty=self.penalty, penalty_state=state)
    model = life.model.with_memory(None)
    with self.setup.costs.phase('wake') as cost:
      if not self.trains_backbone:
        adapter, opt_state, loss = fit.train_adapter_steps(
          self.optimizer,
          model.replace(adapter=None),
          model.adapter,
          life.opt_state,
          batches,
          **penalty,
        )
        model = model.replace(adapter=adapter)
        add = cost.add_partial_training
      else:
        model, opt_state, loss = fit.train_steps(
          self.optimizer, model, life.opt_state, *batches, **penalty
        )
        add = cost.add_training
      loss = jax.block_until_ready(loss)
      add(tokens.size, steps=loss.size)
    finite.check_finite('wake', loss, fit.trainable(model))
    model = model.with_memory(life.memory)
    loss = np.asarray(loss)
    observation.steps({'loss': loss})
    return life.replace(model=model, opt_state=opt_state), loss
