"""Attention to the last tokens and the first ones, in constant memory.

A token attends to the `window` last tokens, itself included, to the first
`sinks` of its stream (StreamingLLM, arXiv 2309.17453) and to `persistent` keys
and values that are weights (Titans section 4.1). Keys are kept as they are
before rotation and take their positions from their order among those that are
kept. So positions stay small however long the stream is, and a sink is never
farther away than the window is long.

Letters beside those of `sleep_jax.array_typing`: W tokens of the window, A
tokens that are kept, sinks and window, and N = A + T with the new ones.
"""

import dataclasses
import functools
from typing import NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.models import layers as layers_lib
from sleep_jax.models import lora
from sleep_jax.models.mixers import base

_MASKED = -1e30  # Finite, so that the softmax over nothing is.


@dataclasses.dataclass(frozen=True)
class SlidingWindowConfig:
  """Settings of `sliding_window`; heads and positions are the model's own."""

  window: config.Count = 64  # Tokens attended to, itself included.
  sinks: int = 4  # First tokens of the stream that all attend to.
  persistent: int = 0  # Keys and values that are weights.

  @property
  def kept(self) -> int:
    """Tokens that a layer keeps."""
    return self.sinks + self.window


class State(at.Pytree):
  """The kept tokens; it outlives a window of the stream.

  s: float32, X = 2 E + 1: key, value, and 1 where there is a token. Sinks
    first, then the window, whose newest token is the last.
  """

  s: at.Float[jax.Array, 'B K A X']


class Tokens(NamedTuple):
  """Keys and values `[B, N, K, E]`, and `[B, N]`, 0 where there is none."""

  k: jax.Array
  v: jax.Array
  real: jax.Array


def attend(
  r: SlidingWindowConfig,
  rotate: 'Rotation',
  q_BxTxHxE: jax.Array,
  tokens: Tokens,
  persistent: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
  """What the last T of N tokens read, `[B, T, H, E]`.

  Args:
    r: the settings.
    rotate: rotary embedding at positions `[B, T]`.
    q_BxTxHxE: queries of the last T tokens.
    tokens: the kept ones and then the new ones, in the order of the stream.
    persistent: keys and values `[P, K, E]`, without positions.
  """
  k, v, real = tokens
  rank = jnp.cumsum(real, axis=1).astype(jnp.int32) - 1
  of_query = rank[:, -q_BxTxHxE.shape[1] :]
  is_sink = (rank < r.sinks)[:, None]
  behind = of_query[..., None] - rank[:, None]
  seen = (behind >= 0) & ((behind < r.window) | is_sink)
  seen &= real[:, None] > 0
  k = rotate(k, rank)
  s = scores(rotate(q_BxTxHxE, of_query), k)
  if r.sinks:
    near = jnp.minimum(of_query, r.kept - 1)
    of_sinks = scores(rotate(q_BxTxHxE, near), k)
    s = jnp.where(is_sink[:, None, None], of_sinks, s)
  return softmax_over(s, v, seen, q_BxTxHxE, persistent)


def scores(q_BxTxHxE: jax.Array, k_xNxKxE: jax.Array) -> jax.Array:
  """`[B, K, G, T, N]` of G = H / K queries that share a key, float32.

  Args:
    q_BxTxHxE: queries.
    k_xNxKxE: keys `[B, N, K, E]`, or of all rows `[N, K, E]`.
  """
  b, t, _, e = q_BxTxHxE.shape
  q = q_BxTxHxE.reshape(b, t, k_xNxKxE.shape[-2], -1, e) * e**-0.5
  shared = k_xNxKxE.ndim == 3
  sides = 'btkge,nke->bkgtn' if shared else 'btkge,bnke->bkgtn'
  return jnp.einsum(sides, q, k_xNxKxE, preferred_element_type=jnp.float32)


def softmax_over(
  s_BxKxGxTxN: jax.Array,
  v_BxNxKxE: jax.Array,
  seen_BxTxN: jax.Array,
  q_BxTxHxE: jax.Array,
  persistent: tuple[jax.Array, jax.Array] | None,
) -> jax.Array:
  """What queries read, `[B, T, H, E]`.

  Args:
    s_BxKxGxTxN: scores.
    v_BxNxKxE: values.
    seen_BxTxN: which of them a query sees.
    q_BxTxHxE: the queries as they are without positions.
    persistent: keys and values `[P, K, E]` that all queries see.
  """
  size = v_BxNxKxE.shape[1]
  s = jnp.where(seen_BxTxN[:, None, None], s_BxKxGxTxN, _MASKED)
  if persistent is not None:
    s = jnp.concatenate([s, scores(q_BxTxHxE, persistent[0])], axis=-1)
  p = jax.nn.softmax(s, axis=-1).astype(v_BxNxKxE.dtype)
  y = jnp.einsum('bkgtn,bnke->btkge', p[..., :size], v_BxNxKxE)
  if persistent is not None:
    y += jnp.einsum('bkgtn,nke->btkge', p[..., size:], persistent[1])
  return y.reshape(q_BxTxHxE.shape)


def keep(r: SlidingWindowConfig, tokens: Tokens) -> Tokens:
  """Of N tokens those that the next one attends to, A places."""
  count = tokens.real.sum(1).astype(jnp.int32)[:, None]
  # Numbers of the tokens in the order of the stream, then of empty places.
  order = jnp.argsort(tokens.real <= 0, axis=1, stable=True)
  rank = jnp.arange(r.kept)[None] + jnp.zeros_like(count)
  in_window = count - r.kept + jnp.arange(r.kept)
  rank = jnp.where(jnp.arange(r.kept) < r.sinks, rank, in_window)
  lowest = jnp.where(jnp.arange(r.kept) < r.sinks, 0, r.sinks)
  there = (rank >= lowest) & (rank < count)
  place = jnp.take_along_axis(order, jnp.maximum(rank, 0), axis=1)

  def taken(x: jax.Array) -> jax.Array:
    x = jnp.take_along_axis(x, place[..., None, None], axis=1)
    return jnp.where(there[..., None, None], x, 0)

  real = there.astype(tokens.real.dtype)
  return Tokens(taken(tokens.k), taken(tokens.v), real)


def read(
  r: SlidingWindowConfig,
  rotate: 'Rotation',
  kept: Tokens,
  q_BxTxHxE: jax.Array,
  new: Tokens,
  persistent: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[Tokens, jax.Array]:
  """Reads T tokens after those that are kept, W at a time.

  So a token's cost and the memory do not grow with T.

  Returns:
    The tokens then kept, and what the new ones read `[B, T, H, E]`; of padding
    it means nothing.
  """
  t, size = q_BxTxHxE.shape[1], min(q_BxTxHxE.shape[1], r.window)

  def step(
    kept: Tokens, xs: tuple[jax.Array, Tokens]
  ) -> tuple[Tokens, jax.Array]:
    q, new = xs
    tokens = Tokens(*map(_after, kept, new))
    return keep(r, tokens), attend(r, rotate, q, tokens, persistent)

  if size == t:
    return step(kept, (q_BxTxHxE, new))

  def split(x: jax.Array) -> jax.Array:
    x = jnp.pad(x, [(0, 0), (0, -t % size)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(len(x), -1, size, *x.shape[2:]), 1, 0)

  kept, out = jax.lax.scan(step, kept, jax.tree.map(split, (q_BxTxHxE, new)))
  out = jnp.moveaxis(out, 0, 1)
  return kept, out.reshape(len(q_BxTxHxE), -1, *out.shape[3:])[:, :t]


def _after(kept: jax.Array, new: jax.Array) -> jax.Array:
  return jnp.concatenate([kept, new.astype(kept.dtype)], axis=1)


@dataclasses.dataclass(frozen=True)
class Rotation:
  """Rotary embedding as the model has it."""

  cfg: config.ModelConfig

  def __call__(
    self, x_BxTxHxE: jax.Array, positions_BxT: jax.Array
  ) -> jax.Array:
    c = self.cfg
    rope = layers_lib.rope_cos_sin(
      positions_BxT, c.resolved_head_dim, c.rope_theta, c.rope_scaling
    )
    return layers_lib.apply_rope(x_BxTxHxE, rope)


class SlidingWindowLayer(nn.Module):
  """The layer of `sliding_window`; `r` are its settings."""

  cfg: config.ModelConfig
  r: SlidingWindowConfig

  @nn.compact
  def __call__(
    self,
    x_BxTxD: jax.Array,
    inputs: base.MixerInputs,
    state: State | None,
    adapter: lora.Adapter | None = None,
  ) -> tuple[jax.Array, State]:
    """Attends, from `state` on; tokens that are padding change nothing."""
    del adapter  # `LayerStack` refuses it.
    c, r = self.cfg, self.r
    dense = functools.partial(nn.DenseGeneral, dtype=x_BxTxD.dtype)

    def project(heads: int, name: str) -> jax.Array:
      y = dense((heads, c.resolved_head_dim), use_bias=c.qkv_bias, name=name)(
        x_BxTxD
      )
      if c.qk_norm and name != 'v':
        y = layers_lib.RMSNorm(c.norm_eps, name=f'{name}_norm')(y)
      return y

    q, k, v = (
      project(heads, name)
      for heads, name in zip(
        (c.heads, c.num_kv_heads, c.num_kv_heads), 'qkv', strict=True
      )
    )
    if state is None:
      state = init_state(c, r, len(x_BxTxD))
    new = Tokens(k, v, inputs.token_mask.astype(jnp.float32))
    persistent = None
    if r.persistent:
      shape = (r.persistent, c.num_kv_heads, c.resolved_head_dim)
      persistent = (
        self.param('persistent_k', nn.initializers.normal(1.0), shape),
        self.param('persistent_v', nn.initializers.zeros_init(), shape),
      )
    kept, y = read(r, Rotation(c), _unpack(state), q, new, persistent)
    matrix = dense(c.dim, axis=(-2, -1), use_bias=False, name='o')
    return matrix(y.astype(x_BxTxD.dtype)), _pack(kept)


def _pack(kept: Tokens) -> State:
  real = jnp.broadcast_to(kept.real[..., None, None], (*kept.k.shape[:3], 1))
  s = jnp.concatenate([kept.k, kept.v, real], axis=-1)
  return State(s.swapaxes(1, 2).astype(jnp.float32))


def _unpack(state: State) -> Tokens:
  s = state.s.swapaxes(1, 2)
  k, v = jnp.split(s[..., :-1], 2, axis=-1)
  return Tokens(k, v, s[:, :, 0, -1])


def init_state(
  cfg: config.ModelConfig, r: SlidingWindowConfig, rows: int
) -> State:
  """Nothing is kept yet."""
  width = 2 * cfg.resolved_head_dim + 1
  return State(jnp.zeros((rows, cfg.num_kv_heads, r.kept, width)))


def flops(
  cfg: config.ModelConfig, r: SlidingWindowConfig, context: float
) -> float:
  """Of a token at `context` keys a query, as far as they are kept."""
  keys = min(context, r.kept) + r.persistent
  e, kv_heads = cfg.resolved_head_dim, cfg.num_kv_heads
  projections = cfg.dim * e * (2 * cfg.heads + 2 * kv_heads)
  return 2.0 * (projections + 2 * cfg.heads * e * keys)


class SlidingWindow(base.Mixer):
  """Sliding-window attention with sinks."""

  name = 'sliding_window'
  Config = SlidingWindowConfig
  recurrent = True

  @classmethod
  def module(cls, cfg: config.ModelConfig, name: str | None) -> nn.Module:
    return SlidingWindowLayer(cfg, cfg.recurrent, name=name)

  @classmethod
  def init_state(
    cls, cfg: config.ModelConfig, rows: int, capacity: int
  ) -> State:
    del capacity  # The state does not grow with what was read.
    return init_state(cfg, cfg.recurrent, rows)

  @classmethod
  def flops(cls, cfg: config.ModelConfig, context: float) -> float:
    return flops(cfg, cfg.recurrent, context)
