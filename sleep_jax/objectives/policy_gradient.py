"""Group-relative policy gradients: GRPO (arXiv 2402.03300) and its kin."""

import jax
import jax.numpy as jnp

from sleep_jax import array_typing as at
from sleep_jax import config


def group_advantages(
  rewards_PxG: jax.Array, eps: float = 1e-4, *, scale: bool = True
) -> jax.Array:
  """(r - mean) / (std + eps) within each group of one prompt's samples.

  Without `scale` r - mean: a group counts by its spread (arXiv 2503.20783).
  """
  mean = rewards_PxG.mean(axis=1, keepdims=True)
  std = rewards_PxG.std(axis=1, keepdims=True)
  return (rewards_PxG - mean) / (std + eps if scale else 1.0)


def clipped_gain(
  logp: at.Array,
  old_logp: at.Array,
  advantage: at.Array,
  clip: float = 0.2,
  clip_high: float | None = None,
) -> jax.Array:
  """min(rho A, clip(rho) A) of each token.

  rho is clipped to 1 - clip and 1 + clip, or to 1 + clip_high (DAPO, arXiv
  2503.14476).
  """
  ratio = jnp.exp(logp - old_logp)
  high = clip if clip_high is None else clip_high
  clipped = jnp.clip(ratio, 1 - clip, 1 + high)
  return jnp.minimum(ratio * advantage, clipped * advantage)


def k3(logp: at.Array, reference_logp: at.Array) -> jax.Array:
  """An estimate of KL(policy || reference) at each sampled token, nats.

  e^d - d - 1 with d = log reference - log policy: unbiased and never negative.
  """
  d = reference_logp - jnp.asarray(logp)
  return jnp.exp(d) - d - 1.0


def sampled_divergence(logp: at.Array, teacher_logp: at.Array) -> jax.Array:
  """A loss of each sampled token whose gradient is that of KL(S || T).

  The policy gradient with log T - log S as the advantage; the token stands for
  the vocabulary (OPSD's sampled-token variant, arXiv 2601.18734).
  """
  logp = jnp.asarray(logp)
  advantage = jnp.asarray(teacher_logp) - logp
  return -jax.lax.stop_gradient(advantage) * logp


def token_weights(mask_BxT: at.Array) -> jax.Array:
  """Weights by which a sum is the mean over each row's tokens, then rows."""
  mask = jnp.asarray(mask_BxT).astype(jnp.float32)
  return mask / jnp.maximum(mask.sum(1, keepdims=True), 1.0) / len(mask)


def aggregate(
  loss_BxT: at.Array, mask_BxT: at.Array, name: str
) -> at.Float[jax.Array, '']:
  """One number of the tokens' losses, by the loss called `name`.

  grpo: mean over each row's tokens, then over rows: a token of a long row
    counts less.
  dapo: mean over all tokens (arXiv 2503.14476).
  dr_grpo: sum over all tokens, by B T, whatever rows have (arXiv 2503.20783).
  """
  mask = jnp.asarray(mask_BxT).astype(jnp.float32)
  weight = config.lookup(
    name,
    {
      'grpo': lambda: token_weights(mask),
      'dapo': lambda: mask / jnp.maximum(mask.sum(), 1.0),
      'dr_grpo': lambda: mask / mask.size,
    },
    'learner_config.loss',
  )()
  return (loss_BxT * weight).sum()


def clipped_loss(
  logp_BxT: at.Array,
  old_logp_BxT: at.Array,
  advantage_B: at.Array,
  mask_BxT: at.Array,
  clip: float = 0.2,
) -> jax.Array:
  """-min(rho A, clip(rho) A), averaged over each row's tokens, then rows."""
  gain = clipped_gain(logp_BxT, old_logp_BxT, advantage_B[:, None], clip)
  mask = mask_BxT.astype(gain.dtype)
  per_row = (gain * mask).sum(1) / jnp.maximum(mask.sum(1), 1.0)
  return -per_row.mean()
