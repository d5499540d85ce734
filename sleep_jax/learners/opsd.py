"""opsd: on-policy self-distillation from a self that has seen the solution.

OPSD (arXiv 2601.18734): the model solves a problem, and each token of what it
wrote is corrected towards what a teacher predicts there. The teacher is the
model itself, with the reference solution in its prompt: the base, the model of
this morning, or a running average of the model (SDFT, arXiv 2601.19897). GKD
(2306.13649) with lambda 1, and a teacher of its own context.
"""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.data import problems as problems_lib
from sleep_jax.learners import on_policy
from sleep_jax.lifecycle import life as life_lib
from sleep_jax.models import model as model_lib
from sleep_jax.models import token_logits
from sleep_jax.objectives import divergences
from sleep_jax.objectives import losses
from sleep_jax.objectives import policy_gradient
from sleep_jax.training import fit

_TEACHERS = ('base', 'morning', 'average')
_SAMPLED = 'sampled'


@dataclasses.dataclass(frozen=True)
class OPSDConfig(on_policy.OnPolicyConfig):
  """The teacher, and how far the model is from it."""

  teacher: str = 'base'  # | morning | average.
  teacher_rate: config.Fraction = 0.05  # Of `average`, a step.
  # forward_kl | reverse_kl | jsd over the vocabulary, or `sampled`: reverse_kl
  # estimated by the token that was sampled.
  divergence: str = 'forward_kl'
  beta: config.Fraction = 0.5  # Of jsd.
  # Most that one token of the vocabulary adds to a position's divergence.
  clip: config.Positive | None = None

  def __post_init__(self):
    super().__post_init__()
    config.lookup(
      self.teacher, dict.fromkeys(_TEACHERS), 'learner_config.teacher'
    )
    divergences.check_beta(self.divergence, self.beta, 'learner_config')
    if self.divergence != _SAMPLED:
      self.measure()

  def measure(self) -> divergences.Divergence:
    """The divergence of logits."""
    return divergences.divergence(
      self.divergence, self.beta, self.clip, 'learner_config.divergence'
    )


class Batch(at.Pytree):
  """Rows of a step, and the teacher's states where it predicts their tokens."""

  rollouts: on_policy.Rollouts
  teacher: at.Float[jax.Array, 'B M D']


class OPSD(on_policy.OnPolicy):
  """Self-distillation on the model's own solutions.

  `learner_state['teacher']`, of one that is not the base: its weights, or its
  adapter.
  """

  name: ClassVar[str] = 'opsd'
  Config: ClassVar[type] = OPSDConfig

  def init(self, rng: at.Key) -> life_lib.Life:
    return self._with_teacher(super().init(rng))

  def begin(self, life: life_lib.Life) -> life_lib.Life:
    return self._with_teacher(life) if self.cfg.teacher == 'morning' else life

  def _with_teacher(self, life: life_lib.Life) -> life_lib.Life:
    """The life whose teacher is the model as it is, if it is not the base."""
    if self.cfg.teacher == 'base':
      return life
    copy = jax.tree.map(jnp.array, fit.trainable(life.model))
    return life.replace(learner_state={'teacher': copy})

  def longest_prompt(self, problems: problems_lib.Problems) -> int:
    return max(map(len, problems.privileged))

  def learn(
    self,
    life: life_lib.Life,
    rollouts: on_policy.Rollouts,
    step: on_policy.Step,
  ) -> tuple[life_lib.Life, dict[str, float]]:
    completions = rollouts.completions.tokens
    problems = step.problems
    privileged = self.prompts(problems.privileged, step.index, problems.max_new)
    teacher = self._teacher(life)
    with self.setup.costs.phase('teacher') as cost:
      states = jax.block_until_ready(_states(teacher, privileged, completions))
      cost.add_forward(privileged.tokens.size + completions.size)
    batches = jax.tree.map(lambda x: x[None], Batch(rollouts, states))
    size = rollouts.prompts.tokens.size + completions.size
    life, metrics = self._update(life, batches, teacher.unembedding(), size)
    if self.cfg.teacher == 'average':
      average = _moved(
        life.learner_state['teacher'],
        fit.trainable(life.model),
        self.cfg.teacher_rate,
      )
      life = life.replace(learner_state={'teacher': average})
    return life, metrics

  def _teacher(self, life: life_lib.Life) -> model_lib.Model:
    if self.cfg.teacher == 'base':
      return self.setup.model.with_memory(None)
    model = self.solver(life)
    return fit.with_trainable(model, life.learner_state['teacher'])

  def loss(
    self, model: model_lib.Model, batch: Batch, shared: jax.Array
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    rollouts, matrix = batch.rollouts, shared
    out = on_policy.predict(
      model, rollouts.prompts, rollouts.completions.tokens
    )
    if self.cfg.divergence == _SAMPLED:
      tokens = rollouts.completions.tokens
      per_token = policy_gradient.sampled_divergence(
        model.map_logits(losses.logprobs, out, tokens),
        token_logits.map_tokens(losses.logprobs, batch.teacher, matrix, tokens),
      )
    else:
      per_token = divergences.from_hidden(
        self.cfg.measure(),
        (batch.teacher, matrix),
        (out.hidden, model.unembedding()),
        chunk=token_logits.columns_at_once(1, model.cfg.vocab),
      )
    loss = policy_gradient.aggregate(per_token, rollouts.mask, 'dapo')
    return loss, {'loss': loss}


@jax.jit
def _states(
  teacher: model_lib.Model,
  prompts: on_policy.Prompts,
  completions: jax.Array,
) -> at.Float[jax.Array, 'B M D']:
  """The teacher's hidden states where it predicts the completions' tokens."""
  return on_policy.predict(teacher, prompts, completions).hidden


@functools.partial(jax.jit, static_argnums=2)
def _moved(average: at.Tree, model: at.Tree, rate: float) -> at.Tree:
  """The average after the model's step."""
  return jax.tree.map(lambda a, x: a + rate * (x - a), average, model)
