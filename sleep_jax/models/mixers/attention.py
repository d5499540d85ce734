"""Attention, and what it stands on: the norm and the rotary angles."""

import functools

from flax import linen as nn
import jax
import jax.numpy as jnp

from sleep_jax import config
from sleep_jax.models import layers as layers_lib
from sleep_jax.models import lora


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
      shape = (heads, c.resolved_head_dim)
      y = dense(shape, use_bias=c.qkv_bias, name=name)(x_BxTxD)
      return lora.apply(y, adapter, 'attention', name, x_BxTxD)

    q = into(c.heads, 'q')
    k = into(c.num_kv_heads, 'k')
    v = into(c.num_kv_heads, 'v')
    if c.qk_norm:
      q = layers_lib.RMSNorm(c.norm_eps, name='q_norm')(q)
      k = layers_lib.RMSNorm(c.norm_eps, name='k_norm')(k)
    q = layers_lib.apply_rope(q, turn)
    k = layers_lib.apply_rope(k, turn)
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
    q = q.reshape(b, q_len, c.num_kv_heads, groups, c.resolved_head_dim)
    shared = (b, c.num_kv_heads, groups * q_len)
    q = q.transpose(0, 2, 3, 1, 4).reshape(*shared, c.resolved_head_dim)
    scores = jnp.einsum('bkqe,bkec->bkqc', q, k) * c.resolved_head_dim**-0.5
    scores = scores.reshape(b, c.heads, q_len, -1).astype(jnp.float32)
    # A padded query sees nothing; a finite floor keeps its softmax finite.
    scores = jnp.where(seen_BxTxC[:, None], scores, -1e30)
    p = jax.nn.softmax(scores, axis=-1).astype(x_BxTxD.dtype)
    y = jnp.einsum('bkqc,bkce->bkqe', p.reshape(*shared, -1), v)
    y = y.reshape(b, c.heads, q_len, c.resolved_head_dim).swapaxes(1, 2)
    out = dense(c.dim, axis=(-2, -1), use_bias=False, name='o')(y)
    y = y.reshape(b, q_len, -1)
    return lora.apply(out, adapter, 'attention', 'o', y), kept
