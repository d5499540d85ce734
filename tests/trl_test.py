"""Losses of grpo and opsd against those of trl, on the same numbers.

trl and torch come with the extra `bench`; without them this file is skipped.
"""

import collections
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleep_jax.objectives import divergences
from sleep_jax.objectives import losses
from sleep_jax.objectives import policy_gradient

torch = pytest.importorskip('torch')
pytest.importorskip('trl')
from trl.experimental.gkd import GKDTrainer  # noqa: E402
from trl.experimental.sdft import loss_utils  # noqa: E402
from trl.trainer.grpo_trainer import GRPOTrainer  # noqa: E402

_ROWS, _LENGTH, _VOCAB = 6, 9, 17


def sample(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Logits of a student and a teacher, and tokens."""
  rng = np.random.default_rng(seed)
  student, teacher = 2 * rng.normal(size=(2, _ROWS, _LENGTH, _VOCAB))
  tokens = rng.integers(0, _VOCAB, (_ROWS, _LENGTH))
  return np.float32(student), np.float32(teacher), tokens


def mask() -> np.ndarray:
  """Rows of unequal length; one has no token."""
  lengths = np.array([9, 1, 4, 0, 7, 3])
  return (np.arange(_LENGTH) < lengths[:, None]).astype(np.float32)


class Accelerator:
  """One process."""

  num_processes, sync_gradients = 1, True

  def gather(self, x):
    return x

  def reduce(self, x, reduction):
    return x


def trl_policy_loss(
  kind: str, beta: float, logp: torch.Tensor, old: torch.Tensor, **given
) -> torch.Tensor:
  """`GRPOTrainer._compute_loss`, of given log-probabilities."""
  trainer = types.SimpleNamespace(
    _get_per_token_logps_and_entropies=lambda *a, **k: (
      logp,
      torch.zeros_like(logp),
      None,
    ),
    aux_loss_enabled=False,
    top_entropy_quantile=1.0,
    off_policy_mask_threshold=None,
    importance_sampling_level='token',
    beta=beta,
    epsilon_low=0.2,
    epsilon_high=0.28,
    args=types.SimpleNamespace(
      delta=None, use_bias_correction_kl=False, steps_per_generation=1
    ),
    loss_type=kind,
    use_vllm=False,
    model=types.SimpleNamespace(training=True),
    current_gradient_accumulation_steps=1,
    max_completion_length=_LENGTH,
    accelerator=Accelerator(),
    _entropy_bonus_enabled=False,
    _metrics={'train': collections.defaultdict(list)},
  )
  ones = torch.ones((_ROWS, 2), dtype=torch.long)
  inputs = {
    'prompt_ids': ones,
    'prompt_mask': ones,
    'completion_ids': torch.ones_like(logp, dtype=torch.long),
    'old_per_token_logps': old,
  }
  return GRPOTrainer._compute_loss(trainer, None, inputs | given)


@pytest.mark.parametrize('beta', [0.0, 0.3])
@pytest.mark.parametrize('kind', ['grpo', 'dr_grpo', 'dapo'])
def test_policy_losses_and_gradients_are_those_of_trl(kind, beta):
  student, teacher, tokens = sample()
  rng = np.random.default_rng(1)
  advantage = np.float32(rng.normal(size=_ROWS))
  logp = np.asarray(losses.logprobs(student, tokens))
  reference = np.asarray(losses.logprobs(teacher, tokens))
  # Ratios on both sides of both clips.
  old = logp + np.float32(0.4 * rng.normal(size=logp.shape))

  def loss(logp):
    gain = policy_gradient.clipped_gain(
      logp, old, advantage[:, None], 0.2, 0.28
    )
    per_token = beta * policy_gradient.k3(logp, reference) - gain
    return policy_gradient.aggregate(per_token, mask(), kind)

  ours, slope = jax.value_and_grad(loss)(jnp.asarray(logp))
  theirs_of = torch.tensor(logp, requires_grad=True)
  theirs = trl_policy_loss(
    *(kind, beta, theirs_of, torch.tensor(old)),
    completion_mask=torch.tensor(mask()),
    advantages=torch.tensor(advantage),
    ref_per_token_logps=torch.tensor(reference),
    num_items_in_batch=torch.tensor(mask().sum()),
  )
  theirs.backward()
  np.testing.assert_allclose(ours, theirs.item(), rtol=1e-5)
  np.testing.assert_allclose(slope, theirs_of.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
  'name, beta', [('forward_kl', 0.0), ('reverse_kl', 1.0), ('jsd', 0.3)]
)
def test_divergences_are_those_of_trl(name, beta):
  student, teacher, _ = sample()
  labels = np.where(mask() > 0, 1, -100)
  theirs_of = torch.tensor(student, requires_grad=True)
  theirs = GKDTrainer.generalized_jsd_loss(
    theirs_of, torch.tensor(teacher), torch.tensor(labels), beta=beta
  )
  theirs.backward()

  def loss(student):
    per_token = divergences.divergence(name, beta)(teacher, student)
    return policy_gradient.aggregate(per_token, mask(), 'dapo')

  ours, slope = jax.value_and_grad(loss)(jnp.asarray(student))
  np.testing.assert_allclose(ours, theirs.item(), rtol=1e-5)
  np.testing.assert_allclose(slope, theirs_of.grad, rtol=1e-4, atol=1e-6)


def test_the_sampled_token_variant_is_that_of_trl():
  student, teacher, tokens = sample()
  theirs_of = torch.tensor(student, requires_grad=True)
  theirs = loss_utils.compute_sampled_token_self_distillation_loss(
    theirs_of, torch.tensor(teacher), torch.tensor(tokens),
    distillation_alpha=1.0,
  )  # fmt: skip
  theirs.sum().backward()

  def loss(student):
    per_token = policy_gradient.sampled_divergence(
      losses.logprobs(student, tokens), losses.logprobs(teacher, tokens)
    )
    return per_token.sum(), per_token

  (_, ours), slope = jax.value_and_grad(loss, has_aux=True)(
    jnp.asarray(student)
  )
  np.testing.assert_allclose(ours, theirs.detach(), rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(slope, theirs_of.grad, rtol=1e-4, atol=1e-5)
