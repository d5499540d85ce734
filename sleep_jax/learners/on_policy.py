"""Learners that train on their own solutions of a day's problems.

A step samples completions of some problems from the model as it is, grades
them, and makes one update on them. Which update, a subclass says.
"""

import abc
from collections.abc import Iterator
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.data import contexts
from sleep_jax.data import experience as experience_lib
from sleep_jax.data import order as order_lib
from sleep_jax.data import padding
from sleep_jax.data import problems as problems_lib
from sleep_jax.inference import sampling
from sleep_jax.learners import base
from sleep_jax.learners import collapse
from sleep_jax.learners import finetune
from sleep_jax.lifecycle import life as life_lib
from sleep_jax.metrics import observation
from sleep_jax.models import model as model_lib
from sleep_jax.models import positions as positions_lib
from sleep_jax.models import transformer
from sleep_jax.objectives import losses
from sleep_jax.runtime import finite
from sleep_jax.runtime import sharding
from sleep_jax.training import fit

_ORDER_KEY, _ROLLOUT_KEY = 1, 2


@dataclasses.dataclass(frozen=True)
class OnPolicyConfig(finetune.FinetunerConfig):
  """`finetune.batch` completions make a step, `group` of each problem.

  `finetune.passes` is how often a day's problems are solved.
  """

  group: config.Count = 1
  temperature: config.Positive = 1.0
  alarm: bool = True  # Stops a day whose samples degenerate (`collapse`).

  def __post_init__(self):
    if self.finetune.batch % self.group:
      raise config.ConfigError(
        f'finetune.batch={self.finetune.batch} completions cannot be groups of '
        f'learner_config.group={self.group}; make it a multiple.'
      )


class Prompts(at.Pytree):
  """Prompts of one width, right-aligned, each with its own length."""

  tokens: at.Int[jax.Array, 'N P']
  lengths: at.Int[jax.Array, 'N']

  def followed_by(
    self, completions: jax.Array
  ) -> tuple[at.Int[jax.Array, 'N T'], at.Int[jax.Array, 'N T']]:
    """Tokens and positions of the prompts and what follows them.

    Positions count a row's own tokens: what one prompt is padded by does not
    shift what it predicts.
    """
    tokens = jnp.concatenate([self.tokens, completions], axis=1)
    width = self.tokens.shape[1]
    number = jnp.arange(tokens.shape[1]) - width
    positions = number + self.lengths[:, None]
    padded = positions < 0
    return tokens, jnp.where(padded, positions_lib.PAD_POSITION, positions)


class Rollouts(at.Pytree):
  """Completions of a step's problems.

  prompts: of B rows, groups of one problem side by side.
  completions: what followed them, and its log-probability.
  mask: 1 for each token that a completion has, its stop token included.
  """

  prompts: Prompts
  completions: sampling.Completions
  mask: at.Float[jax.Array, 'B M']


@dataclasses.dataclass(frozen=True)
class Step:
  """Of which problems a step's rows are, and how they were solved."""

  problems: problems_lib.Problems
  index: np.ndarray  # Of each row.
  grades: problems_lib.Grades


def as_prompts(
  prompts: list[contexts.TokenIds], pad: int, width: int
) -> Prompts:
  """Prompts of one width, so that every step has one shape."""
  tokens, lengths = padding.left_pad(prompts, pad, width=width)
  return Prompts(jnp.asarray(tokens), jnp.asarray(lengths))


def predict(
  model: model_lib.Model, prompts: Prompts, completions: jax.Array
) -> transformer.Output:
  """What predicts each token of the completions `[B, M]` after its prompt."""
  tokens, positions = prompts.followed_by(completions)
  out = model.forward(tokens, positions=positions)
  return out.select(slice(None), slice(prompts.tokens.shape[1] - 1, -1))


def logprobs(
  model: model_lib.Model, rollouts: Rollouts, temperature: float
) -> at.Float[jax.Array, 'B M']:
  """Log-probability of each token of the completions, as they are sampled."""
  completions = rollouts.completions.tokens
  return model.map_logits(
    lambda logits, targets: losses.logprobs(logits / temperature, targets),
    predict(model, rollouts.prompts, completions),
    completions,
  )


class OnPolicy(finetune.Finetune, abc.ABC):
  """The day of such a learner; a subclass has `name`, `Config` and `learn`."""

  name: ClassVar[str]
  Config: ClassVar[type]

  def __init__(self, cfg: OnPolicyConfig, setup: base.Setup):
    super().__init__(cfg, setup)
    self._train_steps = jax.jit(self._fit, donate_argnums=(0, 1))

  @abc.abstractmethod
  def learn(
    self,
    life: life_lib.Life,
    rollouts: Rollouts,
    step: Step,
  ) -> tuple[life_lib.Life, dict[str, float]]:
    """The life after an update on rollouts, and what the step measured."""

  @abc.abstractmethod
  def loss(
    self, model: model_lib.Model, batch: at.Tree, shared: at.Tree
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of a step on `batch`, and what is measured, `loss` included.

    `shared` is what all steps of an update are given.
    """

  def longest_prompt(self, problems: problems_lib.Problems) -> int:
    """Tokens of the longest prompt that is read."""
    return max(map(len, problems.prompts))

  def prompts(
    self, of_day: list[contexts.TokenIds], index: np.ndarray, max_new: int
  ) -> Prompts:
    """Those of `index`, as wide as the longest of the day.

    The width is a multiple of few, so that few shapes are compiled.
    """
    longest = max(map(len, of_day))
    width = -(-longest // padding.MULTIPLE) * padding.MULTIPLE
    width = max(longest, min(width, self.setup.model.cfg.max_len - max_new))
    chosen = [of_day[i] for i in index]
    prompts = as_prompts(chosen, self.setup.tokenizer.pad, width)
    return sharding.shard_batch(prompts, 'batch')

  def begin(self, life: life_lib.Life) -> life_lib.Life:
    """The life before the first step of a day."""
    return life

  def solver(self, life: life_lib.Life) -> model_lib.Model:
    """The model that solves: a fine-tuned life's memory holds nothing."""
    return life.model.with_memory(None)

  def wake(
    self, life: life_lib.Life, experience: experience_lib.AnyExperience
  ) -> tuple[life_lib.Life, at.Metrics]:
    problems = self._problems(experience)
    key = jax.random.fold_in(life.rng, life.clock.nights)
    roll_key = jax.random.fold_in(key, _ROLLOUT_KEY)
    life, steps, size = self.begin(life), [], 0
    alarm = collapse.Alarm()
    for number, index in enumerate(self._steps(len(problems), key)):
      step_key = jax.random.fold_in(roll_key, number)
      rollouts, step = self._solve(life, problems, index, step_key)
      first = _metrics(rollouts.completions, step.grades)
      if self.cfg.alarm:
        alarm.tell(first)
      rollouts, step, more = self.refill(life, rollouts, step, step_key)
      life, measured = self.learn(life, rollouts, step)
      steps.append(measured | first)
      size += int(rollouts.completions.lengths.sum()) + more
    clock = life.clock.replace(
      tokens=life.clock.tokens + size // self.cfg.finetune.batch
    )
    life = life.replace(clock=clock).with_frames(experience.frames)
    means = {
      k: float(np.mean([s[k] for s in steps if k in s]))
      for k in sorted({k for s in steps for k in s})
    }
    return life, means | {'generated_tokens': float(size)}

  def _solve(
    self,
    life: life_lib.Life,
    problems: problems_lib.Problems,
    index: np.ndarray,
    key: at.Key,
  ) -> tuple[Rollouts, Step]:
    """Completions of the problems of `index`, and their grades."""
    rollouts = self._roll_out(life, problems, index, key)
    with self.setup.costs.phase('reward'):
      grades = problems.grade(index, texts(rollouts.completions))
    return rollouts, Step(problems, index, grades)

  def refill(
    self, life: life_lib.Life, rollouts: Rollouts, step: Step, key: at.Key
  ) -> tuple[Rollouts, Step, int]:
    """What a step trains on, in place of samples that are of no use to it.

    Returns:
      Rollouts, and whose they are; how many tokens were sampled in vain.
    """
    del life, key
    return rollouts, step, 0

  def _problems(
    self, experience: experience_lib.AnyExperience
  ) -> problems_lib.Problems:
    """The day's.

    Raises:
      ConfigError: there are none, or a prompt leaves no room for a completion.
    """
    problems = getattr(experience, 'problems', None)
    if problems is None:
      raise config.ConfigError(
        f'learner {self.name} needs a task with problems to solve, such as '
        'modular_chains.'
      )
    longest, room = self.longest_prompt(problems), problems.max_new
    max_len = self.setup.model.cfg.max_len
    if longest + room > max_len:
      raise config.ConfigError(
        f'learner {self.name}: a prompt of {longest} tokens and a completion '
        f'of {room} exceed model.max_len={max_len}; raise it, or take shorter '
        'problems.'
      )
    return problems

  def _steps(self, problems: int, key: at.Key) -> Iterator[np.ndarray]:
    """The problem of each row of every step; a short last one is filled up."""
    cfg = self.cfg
    rng = order_lib.numpy_rng(jax.random.fold_in(key, _ORDER_KEY))
    size = cfg.finetune.batch // cfg.group
    for _ in range(cfg.finetune.passes):
      order = rng.permutation(problems)
      order = np.resize(order, -(-problems // size) * size)
      for index in order.reshape(-1, size):
        yield np.repeat(index, cfg.group)

  def _roll_out(
    self,
    life: life_lib.Life,
    problems: problems_lib.Problems,
    index: np.ndarray,
    key: at.Key,
  ) -> Rollouts:
    """A completion of each problem of `index` by the model as it is."""
    tokenizer = self.setup.tokenizer
    prompts = self.prompts(problems.prompts, index, problems.max_new)
    sampler = sampling.SamplerConfig(
      max_new=problems.max_new,
      temperature=self.cfg.temperature,
      stop=tokenizer.stop,
      pad=tokenizer.pad,
    )
    with self.setup.costs.phase('rollout') as cost:
      completions = jax.block_until_ready(
        sampling.generate(
          self.solver(life).merged(),
          *(prompts.tokens, prompts.lengths, key, sampler),
        )
      )
      size = int(prompts.lengths.sum() + completions.lengths.sum())
      cost.add_forward(size)
    inside = jnp.arange(problems.max_new) < completions.lengths[:, None]
    return Rollouts(prompts, completions, inside.astype(jnp.float32))

  def _update(
    self, life: life_lib.Life, batches: at.Tree, shared: at.Tree, size: int
  ) -> tuple[life_lib.Life, dict[str, float]]:
    """An optimizer step for each of `batches`, on `loss`.

    Args:
      life: before it; its weights are donated where they train.
      batches: leaves `[K, B, ...]`.
      shared: see `loss`.
      size: tokens of a step.
    """
    model = self.solver(life)
    tree = fit.trainable(model)
    # Donated are the weights that train, and no others.
    rest = fit.with_trainable(model, {})
    with self.setup.costs.phase('update') as cost:
      tree, opt_state, metrics = self._train_steps(
        *(tree, life.opt_state, rest),
        *(sharding.shard_batch(batches, None, 'batch'), shared),
      )
      metrics = jax.tree.map(np.asarray, jax.block_until_ready(metrics))
      steps = len(metrics['loss'])
      add = cost.add_training
      if not self.trains_backbone:
        add = cost.add_partial_training
      add(steps * size, steps=steps)
    finite.check_finite('wake', metrics['loss'], tree)
    observation.steps({'loss': metrics['loss']})
    model = fit.with_trainable(model, tree).with_memory(life.memory)
    life = life.replace(model=model, opt_state=opt_state)
    return life, {k: float(v.mean()) for k, v in metrics.items()}

  def _fit(
    self,
    tree: at.Tree,
    opt_state: Any,
    model: model_lib.Model,
    batches: at.Tree,
    shared: at.Tree,
  ) -> tuple[at.Tree, Any, dict[str, jax.Array]]:
    """`fit.fit` of `loss`: what trains, its optimizer state, and metrics."""

    def loss_fn(tree, batch):
      return self.loss(fit.with_trainable(model, tree), batch, shared)

    return fit.fit(loss_fn, self.optimizer, tree, opt_state, batches)


def texts(completions: sampling.Completions) -> list[contexts.TokenIds]:
  """Completions on the host, without padding."""
  tokens, lengths = sharding.fetch((completions.tokens, completions.lengths))
  pairs = zip(tokens, lengths, strict=True)
  return [tokens[:length].tolist() for tokens, length in pairs]


def _metrics(
  completions: sampling.Completions, grades: problems_lib.Grades
) -> dict[str, float]:
  """What a step's rollouts were like; `entropy` in nats per token, sampled."""
  lengths, logprobs = sharding.fetch(
    (completions.lengths, completions.logprobs)
  )
  return {
    'reward': float(grades.right.mean()),
    'truncated': float(grades.truncated.mean()),
    'unreadable': float(grades.unreadable.mean()),
    'length': float(lengths.mean()),
    'repetition': collapse.repetition(texts(completions)),
    'entropy': float(-logprobs.sum() / max(1, lengths.sum())),
  }
