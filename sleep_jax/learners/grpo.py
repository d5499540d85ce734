"""grpo: policy gradients on groups of the model's own solutions.

GRPO (arXiv 2402.03300), and by `learner_config.loss` Dr. GRPO (2503.20783) or
DAPO (2503.14476). The reward is 1 for the right answer. A group whose rewards
are all equal says nothing: a step of such groups alone is skipped. Old
log-probabilities are those of the sampler, at its temperature.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.data import order as order_lib
from sleep_jax.data import problems as problems_lib
from sleep_jax.learners import on_policy
from sleep_jax.lifecycle import life as life_lib
from sleep_jax.models import model as model_lib
from sleep_jax.objectives import policy_gradient

_LOSSES = ('grpo', 'dr_grpo', 'dapo')
_SCALES = ('group', 'none')
_RESAMPLE_KEY = 2**31 - 1  # Of a step's key; its tokens have the others.


@dataclasses.dataclass(frozen=True)
class GRPOConfig(on_policy.OnPolicyConfig):
  """The policy gradient; see `policy_gradient` for its parts."""

  group: config.Count = 8
  loss: str = 'grpo'  # How tokens are weighed: grpo | dr_grpo | dapo.
  scale: str = 'group'  # Advantages by the group's spread; or none.
  iterations: config.Count = 1  # Updates on one step's completions.
  clip: config.Positive = 0.2
  clip_high: config.Positive = 0.2  # DAPO: 0.28.
  kl: float = 0.0  # Weight of KL(policy || base), by k3.
  mask_truncated: bool = False  # Completions that did not end do not count.
  # Whether the tokens of a group of equal rewards are left out of the loss's
  # mean (DAPO).
  drop_equal: bool = False
  # Batches of other problems that a step may solve to replace such groups.
  resample: int = 0

  def __post_init__(self):
    super().__post_init__()
    config.lookup(self.loss, dict.fromkeys(_LOSSES), 'learner_config.loss')
    config.lookup(self.scale, dict.fromkeys(_SCALES), 'learner_config.scale')
    if self.group < 2:
      raise config.ConfigError(
        f'learner_config.group={self.group}: a completion is compared with '
        'others of its problem; use 2 or more.'
      )


class Batch(at.Pytree):
  """Rows of a step; the rollouts' mask is 0 on those that do not count."""

  rollouts: on_policy.Rollouts
  advantage: at.Float[jax.Array, 'B']
  reference_logp: at.Float[jax.Array, 'B M'] | None


class GRPO(on_policy.OnPolicy):
  """Group-relative policy optimization."""

  name: ClassVar[str] = 'grpo'
  Config: ClassVar[type] = GRPOConfig

  def refill(
    self,
    life: life_lib.Life,
    rollouts: on_policy.Rollouts,
    step: on_policy.Step,
    key: at.Key,
  ) -> tuple[on_policy.Rollouts, on_policy.Step, int]:
    """DAPO's dynamic sampling: groups of equal rewards give way to others.

    What is still missing after `resample` batches stays as it is.
    """
    group, wasted = self.cfg.group, 0
    key = jax.random.fold_in(key, _RESAMPLE_KEY)
    rng = order_lib.numpy_rng(key)
    for number in range(1, self.cfg.resample + 1):
      wanted = np.flatnonzero(self._equal(step.grades))
      if not len(wanted):
        break
      index = rng.choice(
        len(step.problems),
        len(step.index) // group,
        replace=len(step.problems) < len(step.index) // group,
      )
      more, others = self._solve(
        life,
        step.problems,
        np.repeat(index, group),
        jax.random.fold_in(key, number),
      )
      wasted += int(more.completions.lengths.sum())
      useful = np.flatnonzero(~self._equal(others.grades))[: len(wanted)]
      rows, source = (
        (groups[:, None] * group + np.arange(group)).reshape(-1)
        for groups in (wanted[: len(useful)], useful)
      )
      rollouts, step = _replaced((rollouts, step), rows, (more, others), source)
    return rollouts, step, wasted

  def _equal(self, grades: problems_lib.Grades) -> np.ndarray:
    """Which groups have equal rewards."""
    right = grades.right.reshape(-1, self.cfg.group)
    return right.min(axis=1) == right.max(axis=1)

  def learn(
    self,
    life: life_lib.Life,
    rollouts: on_policy.Rollouts,
    step: on_policy.Step,
  ) -> tuple[life_lib.Life, dict[str, float]]:
    cfg, grades = self.cfg, step.grades
    rewards = grades.right.astype(np.float32).reshape(-1, cfg.group)
    equal = self._equal(grades)
    counted = np.ones(len(step.index), bool)
    if cfg.mask_truncated:
      counted &= ~grades.truncated
    if cfg.drop_equal:
      counted &= ~np.repeat(equal, cfg.group)
    measured = {'equal_groups': float(equal.mean()), 'skipped': 0.0}
    if not counted.any() or (equal.all() and not cfg.kl):
      # Even a gradient of zero would move the weights: Adam has momentum.
      return life, measured | {'skipped': 1.0}
    advantage = policy_gradient.group_advantages(
      jnp.asarray(rewards), scale=cfg.scale == 'group'
    )
    tokens, _ = rollouts.prompts.followed_by(rollouts.completions.tokens)
    reference = None
    if cfg.kl:
      with self.setup.costs.phase('teacher') as cost:
        reference = jax.block_until_ready(
          _logprobs(self.setup.model, rollouts, cfg.temperature)
        )
        cost.add_forward(tokens.size)
    batch = Batch(
      rollouts.replace(mask=rollouts.mask * counted[:, None]),
      advantage.reshape(-1),
      reference,
    )
    batches = jax.tree.map(
      lambda x: jnp.broadcast_to(x, (cfg.iterations, *x.shape)), batch
    )
    life, metrics = self._update(life, batches, None, tokens.size)
    return life, measured | metrics

  def loss(
    self, model: model_lib.Model, batch: Batch, shared: None
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    del shared
    cfg, rollouts = self.cfg, batch.rollouts
    logp = on_policy.logprobs(model, rollouts, cfg.temperature)
    gain = policy_gradient.clipped_gain(
      *(logp, rollouts.completions.logprobs, batch.advantage[:, None]),
      *(cfg.clip, cfg.clip_high),
    )
    per_token, metrics = -gain, {}
    if batch.reference_logp is not None:
      kl = policy_gradient.k3(logp, batch.reference_logp)
      per_token += cfg.kl * kl
      metrics['kl'] = policy_gradient.aggregate(kl, rollouts.mask, 'dapo')
    loss = policy_gradient.aggregate(per_token, rollouts.mask, cfg.loss)
    return loss, metrics | {'loss': loss}


_logprobs = jax.jit(on_policy.logprobs, static_argnums=2)

_Sampled = tuple[on_policy.Rollouts, on_policy.Step]


def _replaced(
  to: _Sampled, rows: np.ndarray, by: _Sampled, source: np.ndarray
) -> _Sampled:
  """Rollouts of a step in which others stand in some rows."""

  def put(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x = x.copy()
    x[rows] = y[source]
    return x

  rollouts = jax.tree.map(lambda x, y: x.at[rows].set(y[source]), to[0], by[0])
  old, new = to[1], by[1]
  grades = problems_lib.Grades(
    *(
      put(getattr(old.grades, f.name), getattr(new.grades, f.name))
      for f in dataclasses.fields(problems_lib.Grades)
    )
  )
  step = on_policy.Step(old.problems, put(old.index, new.index), grades)
  return rollouts, step
