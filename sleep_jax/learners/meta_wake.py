"""meta_wake: weights that are good to read with (TTT-E2E, arXiv 2512.23675).

Pretraining for a life that reads by Eq. 2. Every row is read chunk by chunk
with updates of its own, and all weights train on the mean of the chunks'
losses, each taken before its chunk's update: the gradient goes through the
updates. What `sft` learns is the weights that predict best; what this learns is
those from which a few updates predict best (the sequential variant of Nested
Learning Eq. 73: all initial weights are learnt at the slowest level).
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
from sleep_jax.data import padding
from sleep_jax.learners import finetune
from sleep_jax.lifecycle import life as life_lib
from sleep_jax.lifecycle import wake as wake_lib
from sleep_jax.metrics import costs as costs_lib
from sleep_jax.metrics import observation
from sleep_jax.models import flops
from sleep_jax.models import memory_init
from sleep_jax.models import model as model_lib
from sleep_jax.runtime import finite
from sleep_jax.runtime import sharding
from sleep_jax.training import fit

_SMOOTH = 'sgd', 'momentum'


@dataclasses.dataclass(frozen=True)
class MetaWakeConfig(finetune.FinetunerConfig):
  """`finetune` is how all weights train; levels say how a row is read."""

  # False: updates are constants of the gradient, as in first-order MAML.
  second_order: bool = True


class MetaWake(finetune.Finetune):
  """Trains the weights that reading begins with."""

  name: ClassVar[str] = 'meta_wake'
  Config: ClassVar[type] = MetaWakeConfig

  def check(self) -> None:
    super().check()
    levels = self.setup.model.cfg.levels
    moving = [(i, level) for i, level in enumerate(levels) if level.chunk]
    if not moving or not self.trains_backbone:
      raise config.ConfigError(
        'learner meta_wake trains all weights of a model that reads by updates:'
        ' set finetune.target=all and a chunk in model.levels.'
      )
    for i, level in moving:
      if level.optimizer not in _SMOOTH:
        raise config.ConfigError(
          f'model.levels[{i}].optimizer={level.optimizer}: its updates have no '
          'gradient where a gradient is zero; learner meta_wake takes '
          f'{" or ".join(_SMOOTH)}.'
        )

  def _train(
    self, life: life_lib.Life, tokens: jax.Array, weight: jax.Array
  ) -> tuple[life_lib.Life, np.ndarray]:
    """A step per batch of rows; the loss of each."""
    shape = (-1, self.cfg.finetune.batch, tokens.shape[1])
    batches = (
      jnp.asarray(tokens.reshape(shape)),
      jnp.asarray(weight.reshape(shape)),
    )
    with self.setup.costs.phase('wake') as cost:
      model, opt_state, loss = train_steps(
        self.optimizer,
        self.cfg.second_order,
        life.model.with_memory(None),
        life.opt_state,
        sharding.shard_batch(batches, None, 'batch'),
      )
      loss = jax.block_until_ready(loss)
      cost.add(
        tokens=tokens.size,
        flops=tokens.size * self._flops_per_token(cost),
        steps=loss.size,
      )
    finite.check_finite('wake', loss, model.params)
    loss = np.asarray(loss)
    observation.steps({'loss': loss})
    model = model.with_memory(life.memory)
    return life.replace(model=model, opt_state=opt_state), loss

  def respond(
    self,
    life: life_lib.Life,
    prompts: list[list[int]],
    answers: list[list[int]],
  ) -> experience_lib.Response:
    """Scores; log-probabilities are those of reading a row with updates.

    Each answer is read after its prompt as a row of its own; whether it is the
    likeliest is told without updates.
    """
    response = super().respond(life, prompts, answers)
    rows, weights = _rows(prompts, answers, self._multiple(), self._pad())
    batch = self.cfg.finetune.batch
    tokens, weight = padding.pad_to_batches(rows, weights, batch)
    parts = []
    with self.setup.costs.phase('eval') as cost:
      for i in range(0, len(tokens), batch):
        part = (
          jnp.asarray(tokens[i : i + batch]),
          jnp.asarray(weight[i : i + batch]),
        )
        parts.append(read(life.model.with_memory(None), *part))
      cost.add_online(tokens.size, steps=0)
    logprob = -np.concatenate(parts)[: len(prompts)]
    return dataclasses.replace(response, answer_logprob=logprob)

  def _flops_per_token(self, cost: costs_lib.PhaseCost) -> float:
    """A gradient costs twice what it is of: here of reading as well."""
    args = cost.cfg, cost.context
    reading = flops.wake_flops(*args)
    if self.cfg.second_order:
      return 3.0 * reading
    return flops.train_flops(*args) + reading - flops.forward_flops(*args)

  def _pad(self) -> int:
    return self.setup.tokenizer.pad

  def _multiple(self) -> int:
    """Tokens that a row must be a multiple of: the slowest chunk."""
    return max(level.chunk for level in self.setup.model.cfg.levels)


def _losses(
  model: model_lib.Model,
  tokens_BxT: jax.Array,
  weight_BxT: jax.Array,
  second_order: bool,
) -> at.Float[jax.Array, 'B M']:
  """The loss of every chunk of every row, read with updates of its own."""
  model = model.with_memory(memory_init.init_memory(model.cfg))
  clock = jnp.zeros((), jnp.int32)

  def of_row(tokens: jax.Array, weight: jax.Array) -> jax.Array:
    return wake_lib.read_rows(
      model,
      clock,
      tokens[None],
      weight[None],
      defer_due_update=False,
      second_order=second_order,
    )[1]

  return jax.vmap(of_row)(tokens_BxT, weight_BxT)


def _targets(weight_BxT: jax.Array, chunks: int) -> at.Float[jax.Array, 'B M']:
  """How many targets each chunk's loss is a mean of."""
  after = jnp.pad(weight_BxT[:, 1:], ((0, 0), (0, 1)))
  return after.reshape(len(after), chunks, -1).sum(-1)


@jax.jit
def read(
  model: model_lib.Model, tokens_BxT: jax.Array, weight_BxT: jax.Array
) -> at.Float[jax.Array, 'B']:
  """Minus the log-probability of each row's targets, in nats."""
  losses = _losses(model, tokens_BxT, weight_BxT, second_order=True)
  return (losses * _targets(weight_BxT, losses.shape[1])).sum(1)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2, 3))
def train_steps(
  optimizer: optax.GradientTransformation,
  second_order: bool,
  model: model_lib.Model,
  opt_state: Any,
  batches: tuple[jax.Array, jax.Array],
) -> tuple[model_lib.Model, Any, at.Float[jax.Array, 'K']]:
  """K steps on rows that are read with updates.

  Args:
    optimizer: of the weights (static).
    second_order: whether the gradient goes through the updates (static).
    model: without memory; its weights are donated.
    opt_state: donated.
    batches: tokens and weights `[K, B, T]`, T a multiple of every chunk.

  Returns:
    Model, optimizer state, and the loss of each step in nats per token, every
    chunk's before its update.
  """

  def loss_fn(tree, batch):
    changed = fit.with_trainable(model, tree)
    tokens, weight = batch
    losses = _losses(changed, tokens, weight, second_order)
    targets = _targets(weight, losses.shape[1])
    loss = (losses * targets).sum() / jnp.maximum(targets.sum(), 1.0)
    return loss, loss

  tree, opt_state, loss = fit.fit(
    loss_fn, optimizer, fit.trainable(model), opt_state, batches
  )
  return fit.with_trainable(model, tree), opt_state, loss


def _rows(
  prompts: list[list[int]], answers: list[list[int]], multiple: int, pad: int
) -> tuple[np.ndarray, np.ndarray]:
  """Rows of a prompt and its answer; the answer's tokens are the targets."""
  longest = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
  length = -(-longest // multiple) * multiple
  tokens = np.full((len(prompts), length), pad, np.int32)
  weight = np.zeros(tokens.shape, np.float32)
  for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
    end = len(prompt) + len(answer)
    tokens[i, :end] = [*prompt, *answer]
    weight[i, len(prompt) : end] = 1.0
  return tokens, weight
