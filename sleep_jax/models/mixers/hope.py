"""Self-modifying Titans (`hope`, Nested Learning Eq. 83 to 93).

Five linear memories share the key of a token: of keys, values, rates, decays,
and the one that is asked. All of them are columns of one matrix M `[K, X]` a
head, X = 3 K + 2, so that of an input x_t, a vector of length 1,

  (k_t, v_t, _, eta_t, alpha_t) = x_t M_c
  w_t = v_t M_c                          (each memory makes its own value)
  M_t = (alpha_t I - eta_t k_t k_t^T) M_{t-1}
        - eta_t k_t (k_t M_c - w_t)      (Delta Gradient Descent)
  o_t = q_t M_t, its third part

with M_c as the token's chunk began, and |k M - w|^2 / 2 as the loss. Only q_t
has weights that reading does not change. The recurrence is that of Gated
DeltaNet with beta = eta / alpha, and alpha (w_t - k_t M_c) as its value, so its
chunked form computes it.

The error is taken away twice, by the decay along k_t and by the gradient, so
the factor along k_t is alpha - 2 eta; rates are bounded for it to stay in
[-1, 1], or, without `negative`, in [0, 1]. A block of `hope` and a chain of
levels behind it is the Hope block (section 8.3).
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
from sleep_jax.models.mixers import slots as slots_lib


@dataclasses.dataclass(frozen=True)
class HopeConfig:
  """Settings of `hope`."""

  heads: config.Count = 4
  width: config.Count = 32  # Of a head's keys and values.
  conv: config.Count = 4  # Tokens that the short convolution sees.
  chunk: config.Count = 16  # Tokens that the memories of one moment read.
  # Whether what is known of a key may change its sign, which counting needs.
  negative: bool = False

  @property
  def columns(self) -> int:
    """X: those of keys, values, answers, rate and decay."""
    return 3 * self.width + 2


class State(at.Pytree):
  """What a layer carries from token to token; `s` outlives the window.

  s: float32, what has been added to the initial memories.
  since: and of that, what since the chunk began.
  count: tokens of the window so far.
  """

  s: at.Float[jax.Array, 'B H K X']
  since: at.Float[jax.Array, 'B H K X']
  count: at.Int[jax.Array, 'B']
  conv_state: at.Float[jax.Array, 'B W Z']


class Tokens(NamedTuple):
  """What the memories read: vectors of length 1, and 0 for padding."""

  x: at.Float[jax.Array, 'B H T K']
  q: at.Float[jax.Array, 'B H T K']
  real: at.Float[jax.Array, 'B H T']


class Memories(NamedTuple):
  """M as it is, and as the chunk began."""

  now: at.Float[jax.Array, 'B H K X']
  began: at.Float[jax.Array, 'B H K X']


def read_chunk(
  r: HopeConfig, memories: Memories, tokens: Tokens
) -> tuple[Memories, jax.Array]:
  """Reads tokens of one chunk, and answers each: `[B, H, C, K]`.

  `memories.began` stays, since the chunk may go on.
  """
  (now, began), (x, q, real) = memories, tokens
  cuts = (r.width, 2 * r.width, 3 * r.width, 3 * r.width + 1)
  k, v, _, rate, decay = jnp.split(x @ began, cuts, axis=-1)
  k = deltanet.l2_normalize(k)
  value = deltanet.l2_normalize(v) @ began - k @ began
  # Slow to forget at first: sigmoid(4).
  log_alpha = nn.log_sigmoid(decay[..., 0] + 4.0) * real
  alpha = jnp.exp(log_alpha)
  largest = (1.0 + alpha) / 2 if r.negative else alpha / 2
  beta = nn.sigmoid(rate[..., 0]) * largest / alpha * real

  def by_token(y: jax.Array) -> jax.Array:
    return jnp.moveaxis(y, 1, 2)

  args = q, k, alpha[..., None] * value, log_alpha, beta
  q, k, value, log_alpha, beta = map(by_token, args)
  if x.shape[2] == 1:  # A solve of one unknown is a detour.
    out, now = deltanet.scan_tokens(q, k, value, log_alpha, beta, now)
  else:
    out, now = deltanet.scan_chunks(q, k, value, log_alpha, beta, now, r.chunk)
  answers = by_token(out)[..., 2 * r.width : 3 * r.width]
  return Memories(now, began), answers


def read(
  r: HopeConfig, memories: Memories, count: jax.Array, tokens: Tokens
) -> tuple[Memories, jax.Array]:
  """`read_chunk` of any number of tokens T that follow `count` others.

  Returns:
    The memories after them, and the answers `[B, H, T, K]`; those of padding
    have no meaning.
  """
  slots = slots_lib.of_stream(count, tokens.real[:, 0], r.chunk)

  def step(
    memories: Memories, xs: tuple[jax.Array | int, Tokens]
  ) -> tuple[Memories, jax.Array]:
    number, tokens = xs
    (now, began), out = read_chunk(r, memories, tokens)
    ends = slots.ends(number)[:, None, None, None]
    return Memories(now, jnp.where(ends, now, began)), out

  if tokens.x.shape[2] == 1:
    return step(memories, (0, tokens))
  xs = jnp.arange(slots.chunks), Tokens(*map(slots.split, tokens))
  memories, out = jax.lax.scan(step, memories, xs)
  return memories, slots.join(out)


class HopeLayer(nn.Module):
  """The layer of `hope`."""

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
      state = Hope.init_state(c, len(x_BxTxD), 0)
    dense = functools.partial(nn.Dense, use_bias=False, dtype=dtype)
    xq = dense(2 * r.heads * r.width, name='xq')(x_BxTxD)
    xq = jnp.where(inputs.token_mask[..., None], xq, 0)
    init = nn.initializers.normal(r.conv**-0.5)
    kernel = self.param('conv', init, (r.conv, xq.shape[-1]))
    xq, conv_state = deltanet.convolve(xq, state.conv_state, kernel)
    xq = nn.silu(xq).reshape(*xq.shape[:2], 2, r.heads, r.width)
    x, q = jnp.moveaxis(deltanet.l2_normalize(xq), (2, 3), (0, 2))
    real = jnp.broadcast_to(inputs.token_mask[:, None], x.shape[:3])
    initial = self.param(
      'memory',
      nn.initializers.normal(r.width**-0.5),
      (r.heads, r.width, r.columns),
    )
    memories = Memories(
      now=initial + state.s, began=initial + (state.s - state.since)
    )
    tokens = Tokens(x, q, real.astype(jnp.float32))
    with jax.default_matmul_precision('highest'):
      (now, began), out = read(r, memories, state.count, tokens)
    count = state.count + inputs.token_mask.sum(1).astype(jnp.int32)
    state = State(now - initial, now - began, count, conv_state)
    out = deltanet.gated_output(self, c, x_BxTxD, out.swapaxes(1, 2))
    return out, state


class Hope(base.Mixer):
  """Self-modifying Titans (Nested Learning, section 8)."""

  name = 'hope'
  Config = HopeConfig
  recurrent = True

  @classmethod
  def module(cls, cfg: config.ModelConfig, name: str | None) -> nn.Module:
    return HopeLayer(cfg, name=name)

  @classmethod
  def init_state(
    cls, cfg: config.ModelConfig, rows: int, capacity: int
  ) -> State:
    del capacity  # The state does not grow with what was read.
    r = cfg.recurrent
    shape = (rows, r.heads, r.width, r.columns)
    width = 2 * r.heads * r.width
    return State(
      s=jnp.zeros(shape),
      since=jnp.zeros(shape),
      count=jnp.zeros((rows,), jnp.int32),
      conv_state=jnp.zeros((rows, r.conv - 1, width), cfg.dtype),
    )

  @classmethod
  def flops(cls, cfg: config.ModelConfig, context: float) -> float:
    """As the recurrence needs them; within a chunk more are computed."""
    del context
    r = cfg.recurrent
    # Three products with M_c, and what the recurrence takes.
    memory = 6 * r.width * r.columns
    projections = 4 * cfg.dim * r.heads * r.width
    convolution = r.conv * 2 * r.heads * r.width
    return 2.0 * (projections + convolution + r.heads * memory)
