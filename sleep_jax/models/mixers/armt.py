"""Associative recurrent memory (`armt`, arXiv 2407.04841).

Attention within a segment of S tokens, and M tokens of memory behind them,
which pass through the whole stack (`models.segments`). Every layer has an
associative memory A `[P, D]` with a normaliser z `[P]`. Before a layer all
tokens of a segment read it, and after the layer the outputs m_i of its memory
tokens are written by a delta rule:

  h   <- h + phi(W_q h) A / (phi(W_q h) z)
  k_i  = phi(W_k m_i),  v_i = W_v m_i,  beta_i = sigmoid(W_b m_i)
  A   <- A + sum_i beta_i k_i (v_i - k_i A / (k_i z))
  z   <- z + sum_i gamma_i k_i,  gamma_i = 1 - k_i z / |k_i|^2 in [0, 1]

phi is DPFP (arXiv 2102.11174): products of the entries of [relu x, relu -x]
with those 1 to nu places on; no gradient flows through gamma. As in the
authors' code phi has length 1, W_v begins at 0, and 1e-5 is added where z
divides. All memory tokens are written at once.

A window, or a stream that is asked, may end within a segment: memory tokens
then stand behind what there is of it, and what they write is taken back if the
segment goes on. Positions are counted from the beginning of a segment.
"""

import dataclasses
import functools

from flax import linen as nn
import jax
import jax.numpy as jnp

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.models import layers as layers_lib
from sleep_jax.models import lora
from sleep_jax.models.mixers import base
from sleep_jax.models.mixers import sliding_window

_EPS = 1e-5  # Of the divisor z.


@dataclasses.dataclass(frozen=True)
class ARMTConfig:
  """Settings of `armt`; heads of attention are the model's own."""

  segment: config.Count = 128  # S, tokens.
  memory: config.Count = 10  # M, memory tokens behind each segment.
  width: config.Count = 64  # Of queries and keys before phi.
  nu: config.Count = 3  # Of phi.

  @property
  def features(self) -> int:
    """P, entries of phi."""
    return 2 * self.nu * self.width


class State(at.Pytree):
  """What a layer carries from token to token; `s` outlives the window.

  s: float32, V = D + 1: A and z, with what the segment has written so far.
  start: and as the segment began; 0 where none has.
  segment: of its tokens so far, rotated key, value, and 1 where there is one.
  """

  s: at.Float[jax.Array, 'B 1 P V']
  start: at.Float[jax.Array, 'B 1 P V']
  segment: at.Float[jax.Array, 'B K S Z']

  @property
  def count(self) -> jax.Array:
    """Tokens of the segment so far, `[B]`."""
    return self.segment[:, 0, :, -1].sum(-1).astype(jnp.int32)

  @property
  def began(self) -> tuple[jax.Array, jax.Array]:
    """A `[B, P, D]` and z `[B, P]` as the segment began."""
    none = (self.count == 0)[:, None, None]
    s = jnp.where(none, self.s[:, 0], self.start[:, 0])
    return s[..., :-1], s[..., -1]


def dpfp(x: jax.Array, nu: int) -> jax.Array:
  """phi, of length 1: `[..., W]` to `[..., 2 nu W]`, float32."""
  x = x.astype(jnp.float32)
  x = jnp.concatenate([nn.relu(x), nn.relu(-x)], axis=-1)
  y = jnp.concatenate(
    [x * jnp.roll(x, j, axis=-1) for j in range(1, nu + 1)], axis=-1
  )
  return y * jax.lax.rsqrt((y * y).sum(-1, keepdims=True) + 1e-12)


def recall(
  memory: tuple[jax.Array, jax.Array], q_BxTxP: jax.Array
) -> at.Float[jax.Array, 'B T D']:
  """What the memory holds for each query."""
  a, z = memory
  divisor = jnp.einsum('btp,bp->bt', q_BxTxP, z)[..., None] + _EPS
  return jnp.einsum('btp,bpd->btd', q_BxTxP, a) / divisor


def written(
  memory: tuple[jax.Array, jax.Array],
  k_BxMxP: jax.Array,
  v_BxMxD: jax.Array,
  beta_BxMx1: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """A and z after the memory tokens of one segment."""
  a, z = memory
  new = beta_BxMx1 * (v_BxMxD - recall(memory, k_BxMxP))
  known = jnp.einsum('bmp,bp->bm', k_BxMxP, z)
  gamma = 1.0 - known / jnp.maximum((k_BxMxP**2).sum(-1), _EPS)
  gamma = jax.lax.stop_gradient(jnp.clip(gamma, 0.0, 1.0))
  a = a + jnp.einsum('bmp,bmd->bpd', k_BxMxP, new)
  return a, z + jnp.einsum('bmp,bm->bp', k_BxMxP, gamma)


class ARMTLayer(nn.Module):
  """The layer of `armt`, of a piece of one segment and its memory tokens.

  A piece is W places, of which the first ones hold tokens, and the M memory
  tokens stand behind them.
  """

  cfg: config.ModelConfig

  def setup(self):
    c, r = self.cfg, self.cfg.recurrent
    dense = functools.partial(nn.DenseGeneral, dtype=jnp.dtype(c.dtype))
    kv = c.num_kv_heads, c.resolved_head_dim
    self.q = dense((c.heads, kv[1]), use_bias=c.qkv_bias)
    self.k = dense(kv, use_bias=c.qkv_bias)
    self.v = dense(kv, use_bias=c.qkv_bias)
    self.o = dense(c.dim, axis=(-2, -1), use_bias=False)
    if c.qk_norm:
      self.q_norm = layers_lib.RMSNorm(c.norm_eps)
      self.k_norm = layers_lib.RMSNorm(c.norm_eps)
    of_memory = functools.partial(nn.Dense, dtype=jnp.float32, use_bias=False)
    self.ask = of_memory(r.width)
    self.to_key = of_memory(r.width)
    self.to_value = of_memory(c.dim, kernel_init=nn.initializers.zeros_init())
    self.rate = nn.Dense(1, dtype=jnp.float32)

  def read(self, x_BxTxD: jax.Array, state: State) -> jax.Array:
    """Tokens with what the memory of earlier segments holds for them."""
    with jax.default_matmul_precision('highest'):
      q = dpfp(self.ask(x_BxTxD), self.cfg.recurrent.nu)
      return x_BxTxD + recall(state.began, q).astype(x_BxTxD.dtype)

  def __call__(
    self,
    x_BxTxD: jax.Array,
    inputs: base.MixerInputs,
    state: State,
    adapter: lora.Adapter | None = None,
  ) -> tuple[jax.Array, State]:
    """Attends within the segment, T = W + M; see the class's docstring.

    The state is that of the piece, and not yet written to.
    """
    del adapter  # `LayerStack` refuses it.
    c, (b, t) = self.cfg, x_BxTxD.shape[:2]
    size, memory = c.recurrent.segment, c.recurrent.memory
    new = inputs.token_mask[:, : t - memory].sum(1).astype(jnp.int32)
    end = state.count + new  # Tokens of the segment after this piece.
    place = state.count[:, None] + jnp.arange(t - memory)
    at_end = end[:, None] + jnp.arange(memory)
    position = jnp.concatenate([place, at_end], axis=1)
    rotate = sliding_window.Rotation(c)
    q, k, v = self.q(x_BxTxD), self.k(x_BxTxD), self.v(x_BxTxD)
    if c.qk_norm:
      q, k = self.q_norm(q), self.k_norm(k)
    q, k = rotate(q, position), rotate(k, position)
    segment = _placed(state, k[:, :-memory], v[:, :-memory], new)
    keys, values = (
      jnp.concatenate([x.swapaxes(1, 2).astype(y.dtype), y[:, -memory:]], 1)
      for x, y in zip(jnp.split(segment[..., :-1], 2, -1), (k, v), strict=True)
    )
    column = jnp.broadcast_to(jnp.arange(size), (b, size))
    seen = (column < end[:, None])[:, None]
    seen &= column[:, None] <= position[..., None]
    of_memory = at_end[:, None] <= position[..., None]
    s = sliding_window.scores(q, keys)
    seen = jnp.concatenate([seen, of_memory], axis=-1)
    y = sliding_window.softmax_over(s, values, seen, q, None)
    state = state.replace(start=_packed(*state.began), segment=segment)
    return self.o(y.astype(x_BxTxD.dtype)), state

  def write(
    self, x_BxTxD: jax.Array, inputs: base.MixerInputs, state: State
  ) -> State:
    """The state after what the layer has made of the piece.

    Rows without a token in it keep theirs.
    """
    r = self.cfg.recurrent
    m = x_BxTxD[:, -r.memory :]
    with jax.default_matmul_precision('highest'):
      s = _packed(
        *written(
          state.began,
          dpfp(self.to_key(m), r.nu),
          self.to_value(m),
          nn.sigmoid(self.rate(m)),
        )
      )
    goes_on = (state.count % r.segment > 0)[:, None, None, None]
    is_new = inputs.token_mask.any(1)[:, None, None, None]
    return State(
      s=jnp.where(is_new, s, state.s),
      start=jnp.where(goes_on, state.start, 0.0),
      segment=jnp.where(goes_on, state.segment, 0.0),
    )


def _packed(a: jax.Array, z: jax.Array) -> jax.Array:
  """`State.s` of A `[B, P, D]` and z `[B, P]`."""
  return jnp.concatenate([a, z[..., None]], axis=-1)[:, None]


def _placed(
  state: State, k_BxWxKxE: jax.Array, v_BxWxKxE: jax.Array, new_B: jax.Array
) -> jax.Array:
  """`State.segment` with the first `new_B` of W tokens at its free places."""
  size, width = state.segment.shape[2], k_BxWxKxE.shape[1]
  slot = jnp.arange(size) - state.count[:, None]
  is_new = ((slot >= 0) & (slot < new_B[:, None]))[:, None, :, None]
  ones = jnp.ones_like(k_BxWxKxE[..., :1])
  tokens = jnp.concatenate([k_BxWxKxE, v_BxWxKxE, ones], axis=-1)
  tokens = jnp.take_along_axis(
    tokens, jnp.clip(slot, 0, width - 1)[..., None, None], axis=1
  )
  tokens = tokens.swapaxes(1, 2).astype(jnp.float32)
  return jnp.where(is_new, tokens, state.segment)


class ARMT(base.Mixer):
  """Attention within segments, and an associative memory of earlier ones."""

  name = 'armt'
  Config = ARMTConfig
  recurrent = True
  segmented = True

  @classmethod
  def module(cls, cfg: config.ModelConfig, name: str | None) -> nn.Module:
    return ARMTLayer(cfg, name=name)

  @classmethod
  def init_state(
    cls, cfg: config.ModelConfig, rows: int, capacity: int
  ) -> State:
    del capacity  # The state does not grow with what was read.
    r, kv_heads = cfg.recurrent, cfg.num_kv_heads
    shape = rows, 1, r.features, cfg.dim + 1
    width = 2 * cfg.resolved_head_dim + 1
    return State(
      s=jnp.zeros(shape),
      start=jnp.zeros(shape),
      segment=jnp.zeros((rows, kv_heads, r.segment, width)),
    )

  @classmethod
  def flops(cls, cfg: config.ModelConfig, context: float) -> float:
    """With its share of the memory tokens, through the layer's MLPs too."""
    del context
    r, d, e = cfg.recurrent, cfg.dim, cfg.resolved_head_dim
    share = r.memory / r.segment
    projections = d * e * (2 * cfg.heads + 2 * cfg.num_kv_heads)
    keys = (r.segment + 1) / 2 + share * (r.segment + r.memory) / 2
    state = r.features * (d + 1)
    mlps = sum(3 * d * level.hidden for level in cfg.levels_per_block)
    of_token = projections + d * r.width + state
    of_write = d * (r.width + d + 1) + 2 * state
    attention = 2 * cfg.heads * e * keys
    return 2.0 * (
      (1 + share) * of_token + attention + share * (of_write + mlps)
    )
