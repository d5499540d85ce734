"""Titans' memory beside attention (`titans_mag`), or before (`titans_mal`).

Attention is a sliding window, which sees the last tokens exactly; the neural
memory holds what has left it (Titans sections 4.2 and 4.3):

  MAG:  o = norm(SWA(x)) * sigmoid(norm(M(x)))
  MAL:  o = SWA(norm(M(x)))

The paper leaves open which non-linearity gates; it is the sigmoid here.
"""

import dataclasses
import math

from flax import linen as nn
import jax
import jax.numpy as jnp

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.models import layers as layers_lib
from sleep_jax.models import lora
from sleep_jax.models.mixers import base
from sleep_jax.models.mixers import sliding_window
from sleep_jax.models.mixers import titans


@dataclasses.dataclass(frozen=True)
class TitansAttentionConfig(titans.TitansConfig):
  """Settings of the memory, and of the window beside it."""

  window: config.Count = 64  # Tokens attended to, itself included.
  sinks: int = 0  # First tokens of the stream that all attend to.
  persistent: int = 4  # Keys and values that are weights.

  def attention(self) -> sliding_window.SlidingWindowConfig:
    """The window's settings."""
    return sliding_window.SlidingWindowConfig(
      self.window, self.sinks, self.persistent
    )


class State(at.Pytree):
  """What both carry; `s` outlives a window of the stream.

  s: float32, `titans.State.s` and `sliding_window.State.s` in one row.
  since, count, conv_state: as in `titans.State`.
  """

  s: at.Float[jax.Array, 'B 1 1 X']
  since: at.Float[jax.Array, 'B H K Y']
  count: at.Int[jax.Array, 'B']
  conv_state: at.Float[jax.Array, 'B W Z']


def _pack(memory: titans.State, window: sliding_window.State) -> State:
  rows = len(memory.count)
  parts = memory.s.reshape(rows, 1, 1, -1), window.s.reshape(rows, 1, 1, -1)
  return State(
    jnp.concatenate(parts, axis=-1),
    memory.since,
    memory.count,
    memory.conv_state,
  )


def _unpack(
  cfg: config.ModelConfig, state: State
) -> tuple[titans.State, sliding_window.State]:
  memory, window = _empty(cfg, len(state.count))
  size = math.prod(memory.s.shape[1:])
  memory = titans.State(
    state.s[..., :size].reshape(memory.s.shape),
    state.since,
    state.count,
    state.conv_state,
  )
  return memory, sliding_window.State(
    state.s[..., size:].reshape(window.s.shape)
  )


def _empty(
  cfg: config.ModelConfig, rows: int
) -> tuple[titans.State, sliding_window.State]:
  window = cfg.recurrent.attention()
  return (
    titans.Titans.init_state(cfg, rows, 0),
    sliding_window.init_state(cfg, window, rows),
  )


class TitansAttentionLayer(nn.Module):
  """Both; `gated` is MAG, else MAL."""

  cfg: config.ModelConfig
  gated: bool

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
    c = self.cfg
    memory, window = (
      _empty(c, len(x_BxTxD)) if state is None else _unpack(c, state)
    )
    attention = sliding_window.SlidingWindowLayer(
      c, c.recurrent.attention(), name='attention'
    )

    def norm(x: jax.Array, name: str) -> jax.Array:
      return layers_lib.RMSNorm(c.norm_eps, name=name)(x)

    held, memory = titans.TitansLayer(c, name='memory')(x_BxTxD, inputs, memory)
    held = norm(held, 'memory_norm')
    if self.gated:
      seen, window = attention(x_BxTxD, inputs, window)
      out = norm(seen, 'attention_norm') * nn.sigmoid(held)
    else:
      out, window = attention(held, inputs, window)
    return out, _pack(memory, window)


class TitansMAG(base.Mixer):
  """Memory as a gate (arXiv 2501.00663, section 4.2)."""

  name = 'titans_mag'
  Config = TitansAttentionConfig
  recurrent = True
  gated = True

  @classmethod
  def module(cls, cfg: config.ModelConfig, name: str | None) -> nn.Module:
    return TitansAttentionLayer(cfg, cls.gated, name=name)

  @classmethod
  def init_state(
    cls, cfg: config.ModelConfig, rows: int, capacity: int
  ) -> State:
    del capacity  # The state does not grow with what was read.
    return _pack(*_empty(cfg, rows))

  @classmethod
  def flops(cls, cfg: config.ModelConfig, context: float) -> float:
    window = sliding_window.flops(cfg, cfg.recurrent.attention(), context)
    return titans.Titans.flops(cfg, context) + window


class TitansMAL(TitansMAG):
  """Memory as a layer (arXiv 2501.00663, section 4.3)."""

  name = 'titans_mal'
  gated = False
