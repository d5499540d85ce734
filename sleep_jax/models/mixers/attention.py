"""Causal grouped-query attention with rotary positions."""

import functools

from flax import linen as nn
import jax
import jax.numpy as jnp

from sleep_jax import config
from sleep_jax.models import layers as layers_lib
from sleep_jax.models import lora
from sleep_jax.models.kernels import attention
from sleep_jax.models.mixers import base

KVCache = tuple[jax.Array, jax.Array]  # [B, K, E, C] and [B, K, C, E].


class AttentionLayer(nn.Module):
  """Causal grouped-query attention over the row and what the cache holds."""

  cfg: config.ModelConfig

  @nn.compact
  def __call__(
    self,
    x_BxTxD: jax.Array,
    inputs: base.MixerInputs,
    state: KVCache | None,
    adapter: lora.Adapter | None = None,
  ) -> tuple[jax.Array, KVCache | None]:
    """Attends; see `base.Mixer.module`."""
    c = self.cfg
    dense = functools.partial(nn.DenseGeneral, dtype=x_BxTxD.dtype)

    def project(heads: int, name: str) -> jax.Array:
      shape = (heads, c.resolved_head_dim)
      matrix = dense(shape, use_bias=c.qkv_bias, name=name)
      y = layers_lib.by_token(matrix, x_BxTxD)
      return lora.apply(y, adapter, 'attention', name, x_BxTxD)

    q = project(c.heads, 'q')
    k = project(c.num_kv_heads, 'k')
    v = project(c.num_kv_heads, 'v')
    if c.qk_norm:
      q = layers_lib.RMSNorm(c.norm_eps, name='q_norm')(q)
      k = layers_lib.RMSNorm(c.norm_eps, name='k_norm')(k)
    q = layers_lib.apply_rope(q, inputs.rope)
    k = layers_lib.apply_rope(k, inputs.rope)
    # Keys with columns last, values with columns first: so a decode step reads
    # its cache in order.
    k, v = k.transpose(0, 2, 3, 1), v.swapaxes(1, 2)
    new_cache = None
    if state is not None:
      index, update = inputs.cache_index, jax.lax.dynamic_update_slice_in_dim
      assert index is not None  # A state comes with the column to write to.
      k = update(state[0], k, index, axis=3)
      v = update(state[1], v, index, axis=2)
      new_cache = (k, v)
    y = attention.attend(q, k, v, inputs.mask, inputs.cache_index)
    matrix = dense(c.dim, axis=(-2, -1), use_bias=False, name='o')
    out = layers_lib.by_token(matrix, y)
    y = y.reshape(*y.shape[:2], -1)
    return lora.apply(out, adapter, 'attention', 'o', y), new_cache


class Attention(base.Mixer):
  """Softmax attention; its settings are the model's own."""

  name = 'attention'
  Config = config.ModelConfig
  recurrent = False

  @classmethod
  def module(cls, cfg: config.ModelConfig, name: str | None) -> nn.Module:
    return AttentionLayer(cfg, name=name)

  @classmethod
  def init_state(
    cls, cfg: config.ModelConfig, rows: int, capacity: int
  ) -> KVCache:
    shape, e = (rows, cfg.num_kv_heads), cfg.resolved_head_dim
    return (
      jnp.zeros((*shape, e, capacity), cfg.dtype),
      jnp.zeros((*shape, capacity, e), cfg.dtype),
    )

  @classmethod
  def flops(cls, cfg: config.ModelConfig, context: float) -> float:
    heads, kv, e = cfg.heads, cfg.num_kv_heads, cfg.resolved_head_dim
    projections = cfg.dim * e * (2 * heads + 2 * kv)
    return 2.0 * (projections + 2 * heads * e * context)
