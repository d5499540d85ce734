"""Group-relative policy gradients (GRPO)."""

import jax
import jax.numpy as jnp

from sleep_jax import array_typing as at


def group_advantages(rewards_PxG: jax.Array, eps: float = 1e-4) -> jax.Array:
  """(r - mean) / (std + eps) within each group of one prompt's samples."""
  mean = rewards_PxG.mean(axis=1, keepdims=True)
  std = rewards_PxG.std(axis=1, keepdims=True)
  return (rewards_PxG - mean) / (std + eps)


def clipped_gain(
  logp: at.Array, old_logp: at.Array, advantage: at.Array, clip: float = 0.2
) -> jax.Array:
  """min(rho A, clip(rho) A) of each token."""
  ratio = jnp.exp(logp - old_logp)
  clipped = jnp.clip(ratio, 1 - clip, 1 + clip)
  return jnp.minimum(ratio * advantage, clipped * advantage)


def token_weights(mask_BxT: at.Array) -> jax.Array:
  """Weights by which a sum is the mean over each row's tokens, then rows."""
  mask = jnp.asarray(mask_BxT).astype(jnp.float32)
  return mask / jnp.maximum(mask.sum(1, keepdims=True), 1.0) / len(mask)


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
