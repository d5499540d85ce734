"""Titans' memory as context (`titans_mac`, arXiv 2501.00663, section 4.1).

A segment of C tokens attends to itself and to what a neural memory recalls of
the segments before; what attention makes of it is written to the memory, and
gated by what the memory then says of it:

  h_t = M_c(x_t W)                     recalled, M_c as the segment began
  y_t = Attn([P | h_1 .. h_t | x_1 .. x_t])
  S_t, M_t                             from y_t, as in `titans`
  o_t = norm(y_t) * sigmoid(norm(M_t(y_t)))

P are keys and values that are weights. What is recalled for a token stands at
the token's own position, and is seen from there on: the paper puts all of a
segment before its first token, where earlier tokens would see later ones. A
segment is the memory's chunk, so that a stream may be cut anywhere (`slots`).
"""

import dataclasses
import functools
from typing import NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.models import lora
from sleep_jax.models.mixers import base
from sleep_jax.models.mixers import deltanet
from sleep_jax.models.mixers import sliding_window
from sleep_jax.models.mixers import slots as slots_lib
from sleep_jax.models.mixers import titans


@dataclasses.dataclass(frozen=True)
class TitansMACConfig(titans.MemoryConfig):
  """Settings of `titans_mac`; `chunk` is a segment."""

  persistent: int = 4  # Keys and values that are weights.


class State(at.Pytree):
  """What a layer carries from token to token; `s` outlives the window.

  s, since, count: as in `titans.State`.
  segment: of the segment's tokens so far, key and value of what is recalled
    and of the token, and 1 where there is one.
  """

  s: at.Float[jax.Array, 'B H K X']
  since: at.Float[jax.Array, 'B H K Y']
  count: at.Int[jax.Array, 'B']
  segment: at.Float[jax.Array, 'B K C Z']


class _Weights(NamedTuple):
  """Matrices `[I, O]` that are applied within a segment."""

  recalled: jax.Array  # What the memory says, as a token.
  kv: jax.Array  # Keys and values of tokens.
  out: jax.Array
  to_memory: jax.Array  # Query, key and value of what is written.
  gates: jax.Array
  gates_bias: jax.Array
  said: jax.Array  # What the memory says of what was written.
  norms: jax.Array  # [2, D].
  persistent_k: jax.Array  # [P, K, E], and of values.
  persistent_v: jax.Array


class _Segment(NamedTuple):
  """Tokens of one segment; `place` is theirs in it, `[B, n]`."""

  x: jax.Array  # [B, n, D]
  q: jax.Array  # [B, n, H E], of attention.
  ask: jax.Array  # [B, H, n, K], of the memory.
  real: jax.Array  # [B, n]
  place: jax.Array


def _read_segment(
  cfg: config.ModelConfig,
  w: _Weights,
  carry: tuple[titans.Weights, jax.Array],
  tokens: _Segment,
) -> tuple[tuple[titans.Weights, jax.Array], jax.Array]:
  """Reads tokens of one segment, and returns what it makes of each."""
  r, (memory, segment), (b, n) = cfg.recurrent, carry, tokens.real.shape
  h = titans.answer(memory.began, tokens.ask)
  h = h.swapaxes(1, 2).reshape(b, n, -1) @ w.recalled
  segment = segment + _placed(cfg, w, h, tokens)
  y = _attend(cfg, w, segment, tokens) @ w.out
  read_of = titans.tokens(
    r,
    titans.heads_of(y @ w.to_memory, r.heads),
    titans.heads_of(y @ w.gates + w.gates_bias, r.heads),
    tokens.real,
  )
  memory, said = titans.read_chunk(r, memory, read_of)
  said = said.swapaxes(1, 2).reshape(b, n, -1) @ w.said

  def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    squares = (x * x).mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(squares + cfg.norm_eps) * scale

  out = norm(y, w.norms[0]) * nn.sigmoid(norm(said, w.norms[1]))
  return (memory, segment), out


def _placed(
  cfg: config.ModelConfig, w: _Weights, h: jax.Array, tokens: _Segment
) -> jax.Array:
  """What these tokens add to `State.segment`, whose places are still empty."""
  kv_heads, (b, n) = cfg.num_kv_heads, tokens.real.shape
  parts = [
    (x @ w.kv).reshape(b, n, kv_heads, -1).swapaxes(1, 2) for x in (h, tokens.x)
  ]
  parts.append(jnp.ones((b, kv_heads, n, 1)))
  new = jnp.concatenate(parts, axis=-1) * tokens.real[:, None, :, None]
  if n == cfg.recurrent.chunk:
    return new
  where = jax.nn.one_hot(tokens.place, cfg.recurrent.chunk)
  return jnp.einsum('bnc,bknz->bkcz', where, new)


def _attend(
  cfg: config.ModelConfig, w: _Weights, segment: jax.Array, tokens: _Segment
) -> jax.Array:
  """Causal attention within the segment, `[B, n, H E]`."""
  e, rotate = cfg.resolved_head_dim, sliding_window.Rotation(cfg)
  (b, n), chunk = tokens.real.shape, cfg.recurrent.chunk
  place = jnp.broadcast_to(jnp.arange(chunk), (b, chunk))
  h_k, h_v, k, v = (
    x.swapaxes(1, 2) for x in jnp.split(segment[..., :-1], 4, axis=-1)
  )
  # The segment's tokens twice: as recalled, and as they are.
  keys = jnp.concatenate([rotate(h_k, place), rotate(k, place)], axis=1)
  values = jnp.concatenate([h_v, v], axis=1)
  seen = place[:, None] <= tokens.place[..., None]
  seen &= segment[:, 0, None, :, -1] > 0
  seen = jnp.concatenate([seen, seen], axis=-1)
  q = tokens.q.reshape(b, n, cfg.heads, e)
  s = sliding_window.scores(rotate(q, tokens.place), keys)
  persistent = w.persistent_k, w.persistent_v
  y = sliding_window.softmax_over(s, values, seen, q, persistent)
  return y.reshape(b, n, -1)


class TitansMACLayer(nn.Module):
  """The layer of `titans_mac`."""

  cfg: config.ModelConfig

  @nn.compact
  def __call__(
    self,
    x_BxTxD: jax.Array,
    inputs: base.MixerInputs,
    state: State | None,
    adapter: lora.Adapter | None = None,
  ) -> tuple[jax.Array, State]:
    """Mixes, from `state` on; tokens that are padding change nothing."""
    del adapter  # `LayerStack` refuses it.
    c, r, dtype = self.cfg, self.cfg.recurrent, x_BxTxD.dtype
    if state is None:
      state = TitansMAC.init_state(c, len(x_BxTxD), 0)
    dense = functools.partial(nn.Dense, use_bias=False, dtype=jnp.float32)
    q = dense(c.heads * c.resolved_head_dim, name='q')(x_BxTxD)
    ask = dense(r.heads * r.width, name='ask')(x_BxTxD)
    ask = ask.reshape(*ask.shape[:2], r.heads, r.width).swapaxes(1, 2)
    ask = deltanet.l2_normalize(nn.silu(ask))
    real = inputs.token_mask.astype(jnp.float32)
    initial = titans.initial_memory(self, r)
    memory = titans.unpack(r, initial, state.s, state.since)
    with jax.default_matmul_precision('highest'):
      (memory, segment), out = self._read(
        (memory, state.segment),
        state.count,
        (x_BxTxD.astype(jnp.float32), q, ask, real),
      )
    s, since = titans.pack(r, initial, memory)
    count = state.count + inputs.token_mask.sum(1).astype(jnp.int32)
    return out.astype(dtype), State(s, since, count, segment)

  def _read(
    self,
    carry: tuple[titans.Weights, jax.Array],
    count: jax.Array,
    tokens: tuple[jax.Array, ...],
  ) -> tuple[tuple[titans.Weights, jax.Array], jax.Array]:
    """Segment by segment: the memory and the last segment, and `[B, T, D]`."""
    c, (x, q, ask, real) = self.cfg, tokens
    chunk, w = c.recurrent.chunk, self._weights()
    slots = slots_lib.of_stream(count, real, chunk)

    def step(carry, xs):
      number, segment = xs
      (memory, kept), out = _read_segment(c, w, carry, segment)
      ends = slots.ends(number)
      kept = jnp.where(ends[:, None, None, None], 0.0, kept)
      return (titans.with_began(memory, ends), kept), out

    if x.shape[1] == 1:
      place = (count % chunk)[:, None]
      return step(carry, (0, _Segment(x, q, ask, real, place)))

    def split(y_BxTxX: jax.Array) -> jax.Array:
      return slots.split(y_BxTxX[:, None])[:, :, 0]

    place = jnp.broadcast_to(jnp.arange(chunk), (slots.chunks, len(x), chunk))
    xs = _Segment(split(x), split(q), slots.split(ask), split(real), place)
    carry, out = jax.lax.scan(step, carry, (jnp.arange(slots.chunks), xs))
    return carry, slots.join(out[:, :, None])[:, 0]

  def _weights(self) -> _Weights:
    c, r = self.cfg, self.cfg.recurrent
    d, init = c.dim, nn.initializers.lecun_normal()
    of_memory, of_heads = r.heads * r.width, c.heads * c.resolved_head_dim
    kv = c.num_kv_heads * c.resolved_head_dim

    def matrix(name: str, rows: int, columns: int) -> jax.Array:
      return self.param(name, init, (rows, columns))

    shape = r.persistent, c.num_kv_heads, c.resolved_head_dim
    return _Weights(
      recalled=matrix('recalled', of_memory, d),
      kv=matrix('kv', d, 2 * kv),
      out=matrix('o', of_heads, d),
      to_memory=matrix('to_memory', d, 3 * of_memory),
      gates=matrix('gates', d, 3 * r.heads),
      gates_bias=self.param('gates_bias', lambda _: titans.init_gates(r)),
      said=matrix('said', of_memory, d),
      norms=self.param('norms', nn.initializers.ones_init(), (2, d)),
      persistent_k=self.param(
        'persistent_k', nn.initializers.normal(1.0), shape
      ),
      persistent_v=self.param(
        'persistent_v', nn.initializers.zeros_init(), shape
      ),
    )


class TitansMAC(base.Mixer):
  """Memory as context."""

  name = 'titans_mac'
  Config = TitansMACConfig
  recurrent = True

  @classmethod
  def module(cls, cfg: config.ModelConfig, name: str | None) -> nn.Module:
    return TitansMACLayer(cfg, name=name)

  @classmethod
  def init_state(
    cls, cfg: config.ModelConfig, rows: int, capacity: int
  ) -> State:
    del capacity  # The state does not grow with what was read.
    r, e = cfg.recurrent, cfg.resolved_head_dim
    return State(
      s=jnp.zeros((rows, r.heads, r.width, 2 * r.columns)),
      since=jnp.zeros((rows, r.heads, r.width, r.columns)),
      count=jnp.zeros((rows,), jnp.int32),
      segment=jnp.zeros((rows, cfg.num_kv_heads, r.chunk, 4 * e + 1)),
    )

  @classmethod
  def flops(cls, cfg: config.ModelConfig, context: float) -> float:
    """Attention sees half a segment, twice; the memory is asked once more."""
    del context
    r, d, e = cfg.recurrent, cfg.dim, cfg.resolved_head_dim
    of_memory = r.heads * r.width
    projections = d * (2 * cfg.heads * e + 4 * cfg.num_kv_heads * e)
    projections += d * (6 * of_memory + 3 * r.heads)
    keys = r.chunk + 1 + r.persistent
    asked = r.heads * sum(n * m for n, m in r.matrices())
    attention = 2 * cfg.heads * e * keys
    return 2.0 * (projections + attention + asked) + r.flops()
