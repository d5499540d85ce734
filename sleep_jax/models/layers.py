"""Layers that mixers and blocks share: the norm and rotary positions."""

from collections.abc import Callable
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from sleep_jax import array_typing as at
from sleep_jax import config


def apply(module: nn.Module, params: at.Params, *args: Any) -> Any:
  """What a module returns for `args`, with these parameters.

  `Module.apply` is annotated as a pair as well, which it returns where
  collections are mutable; here none are.
  """
  return module.apply({'params': params}, *args)


def by_token(
  fn: Callable[[jax.Array], jax.Array], x_BxT: jax.Array
) -> jax.Array:
  """`fn`, a product with weights, of all tokens in one axis, not two.

  The gradient of the weights contracts over tokens. Over two axes XLA copies
  both factors into another order on a CPU, which costs more than the product.
  On a mesh the axes are left as they are: each may be sharded.

  Args:
    fn: from `[N, ...]` to `[N, ...]`.
    x_BxT: `[B, T, ...]`.
  """
  if not jax.sharding.get_abstract_mesh().empty:
    return fn(x_BxT)
  shape = x_BxT.shape[:2]
  y = fn(x_BxT.reshape(-1, *x_BxT.shape[2:]))
  return y.reshape(*shape, *y.shape[1:])


class RMSNorm(nn.Module):
  """Root-mean-square norm, computed in float32."""

  eps: float

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = self.param('scale', nn.initializers.ones_init(), (x.shape[-1],))
    x32 = x.astype(jnp.float32)
    y = x32 * jax.lax.rsqrt(jnp.mean(x32**2, -1, keepdims=True) + self.eps)
    return (y * scale).astype(x.dtype)


def rope_frequencies(
  half: int, theta: float, scaling: config.RopeScaling | None
) -> jax.Array:
  """RoPE's angle per token, `[half]`, stretched as Llama 3.1 does."""
  freq = theta ** (-jnp.arange(half) / half)
  if scaling is None:
    return freq
  low, high = scaling.low_freq_factor, scaling.high_freq_factor
  rotations = scaling.original_max_len * freq / (2 * jnp.pi)
  unscaled = jnp.clip((rotations - low) / (high - low), 0.0, 1.0)
  return freq * (unscaled + (1.0 - unscaled) / scaling.factor)


def rope_cos_sin(
  positions_BxT: jax.Array,
  size: int,
  theta: float,
  scaling: config.RopeScaling | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Cosine and sine of the rotary angles, `[B, T, 1, E/2]` for all heads.

  Computed once per forward pass: the barrier keeps XLA from computing them
  anew for every head of every layer, which costs more than using them.
  """
  freq = rope_frequencies(size // 2, theta, scaling)
  angle = positions_BxT[..., None, None] * freq
  return jax.lax.optimization_barrier((jnp.cos(angle), jnp.sin(angle)))


def apply_rope(
  x_BxTxHxE: jax.Array, rope: tuple[jax.Array, jax.Array]
) -> jax.Array:
  """Rotary position embedding, halves rotated against each other."""
  cos, sin = rope
  a, b = jnp.split(x_BxTxHxE.astype(jnp.float32), 2, axis=-1)
  y = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return y.astype(x_BxTxHxE.dtype)
