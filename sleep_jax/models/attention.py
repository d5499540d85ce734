"""Attention, and what it stands on: the norm and the rotary angles."""

import functools

from flax import linen as nn
import jax
import jax.numpy as jnp

from sleep_jax import config
from sleep_jax.models import lora


class RMSNorm(nn.Module):
  """Root-mean-square norm, computed in float32."""

  eps: float

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = self.param('scale', nn.initializers.ones_init(), (x.shape[-1],))
    x32 = x.astype(jnp.float32)
    y = x32 * jax.lax.rsqrt(jnp.mean(x32**2, -1, keepdims=True) + self.eps)
    return (y * scale).astype(x.dtype)


def frequencies(
  half: int, theta: float, scaling: config.RopeScaling | None
) -> jax.Array:
  """RoPE's angle per token, `[half]`, stretched as Llama 3.1 does."""
  freq = theta ** (-jnp.arange(half) / half)
  if scaling is None:
    return freq
  low, high = scaling.low_freq_factor, scaling.high_freq_factor
  turns = scaling.original_max_len * freq / (2 * jnp.pi)
  kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
  return freq * (kept + (1.0 - kept) / scaling.factor)


def rotation(
  positions_BxT: jax.Array,
  size: int,
  theta: float,
  scaling: config.RopeScaling | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Cosine and sine of the rotary angles, `[B, T, 1, E/2]` for all heads.

  Computed once per forward pass: the barrier keeps XLA from computing them
  anew for every head of every layer, which costs more than using them.
  """
  freq = frequencies(size // 2, theta, scaling)
  angle = positions_BxT[..., None, None] * freq
  return jax.lax.optimization_barrier((jnp.cos(angle), jnp.sin(angle)))


def rotate(
  x_BxTxHxE: jax.Array, turn: tuple[jax.Array, jax.Array]
) -> jax.Array:
  """Rotary position embedding, halves rotated against each other."""
  cos, sin = turn
  a, b = jnp.split(x_BxTxHxE.astype(jnp.float32), 2, axis=-1)
  y = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return y.astype(x_BxTxHxE.dtype)


class Attention(nn.Module):
  """Causal grouped-query attention over the row and what the cache holds."""

  cfg: config.ModelConfig

  @nn.compact
  def __call__(
    self,
    x_BxTxD: jax.Array,
    turn: tuple[jax.Array, jax.Array],
    seen_BxTxC: jax.Array,
    past: tuple[jax.Array, jax.Array, jax.Array] | None,
    adapter: lora.Adapter | None = None,
  ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
    c = self.cfg
    dense = functools.partial(nn.DenseGeneral, dtype=x_BxTxD.dtype)

    def into(heads: int, name: str) -> jax.Array:
      shape = (heads, c.size_of_head)
      y = dense(shape, use_bias=c.qkv_bias, name=name)(x_BxTxD)
      return lora.add(y, adapter, 'attention', name, x_BxTxD)

    q = into(c.heads, 'q')
    k = into(c.num_kv_heads, 'k')
    v = into(c.num_kv_heads, 'v')
    if c.qk_norm:
      q = RMSNorm(c.norm_eps, name='q_norm')(q)
      k = RMSNorm(c.norm_eps, name='k_norm')(k)
    q = rotate(q, turn)
    k = rotate(k, turn)
    # Keys with columns last, values with columns first, and the queries that
    # share them as one matrix: so a decode step reads its cache in order.
    k, v = k.transpose(0, 2, 3, 1), v.swapaxes(1, 2)
    kept = None
    if past is not None:
      k_old, v_old, start = past
      k = jax.lax.dynamic_update_slice_in_dim(k_old, k, start, axis=3)
      v = jax.lax.dynamic_update_slice_in_dim(v_old, v, start, axis=2)
      kept = (k, v)
    b, q_len = x_BxTxD.shape[:2]
    groups = c.heads // c.num_kv_heads
    q = q.reshape(b, q_len, c.num_kv_heads, groups, c.size_of_head)
    shared = (b, c.num_kv_heads, groups * q_len)
    q = q.transpose(0, 2, 3, 1, 4).reshape(*shared, c.size_of_head)
    scores = jnp.einsum('bkqe,bkec->bkqc', q, k) * c.size_of_head**-0.5
    scores = scores.reshape(b, c.heads, q_len, -1).astype(jnp.float32)
    # A padded query sees nothing; a finite floor keeps its softmax finite.
    scores = jnp.where(seen_BxTxC[:, None], scores, -1e30)
    p = jax.nn.softmax(scores, axis=-1).astype(x_BxTxD.dtype)
    y = jnp.einsum('bkqc,bkce->bkqe', p.reshape(*shared, -1), v)
    y = y.reshape(b, c.heads, q_len, c.size_of_head).swapaxes(1, 2)
    out = dense(c.dim, axis=(-2, -1), use_bias=False, name='o')(y)
    y = y.reshape(b, q_len, -1)
    return lora.add(out, adapter, 'attention', 'o', y), kept
