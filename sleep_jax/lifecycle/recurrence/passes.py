"""The other sleep: offline recurrence into fast weights (arXiv 2605.26099).

A hybrid of attention and linear recurrence reads its stream in windows. Before
a window's keys and values are evicted, the blocks pass over it N times: from
pass to pass go the features and the recurrent states, after the last only the
states stay (Algorithm 1). A prediction is always one pass. Nothing is trained
at this time; that the states come to hold what a later question needs is
learnt beforehand, by back-propagation through windows and passes.
"""

import functools
from typing import NamedTuple

from flax import struct
import jax
import jax.numpy as jnp

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.lifecycle.recurrence import config as recurrence_config
from sleep_jax.lifecycle.recurrence import halting
from sleep_jax.models import cache as cache_lib
from sleep_jax.models import cms
from sleep_jax.models import layer_stack
from sleep_jax.models import layers as layers_lib
from sleep_jax.models import positions as positions_lib
from sleep_jax.models import transformer


@struct.dataclass
class WindowState:
  """What a window leaves to the next.

  states: of the recurrent layers, [B, H, K, V] each.
  k, v, positions: of the window before, under `sliding`; else empty.
  """

  states: tuple[jax.Array, ...]
  k: tuple[jax.Array, ...]
  v: tuple[jax.Array, ...]
  positions: at.Int[jax.Array, 'B C']


class WindowMask(NamedTuple):
  """How the tokens of one window see each other, and those before."""

  turn: tuple[jax.Array, jax.Array]
  seen: jax.Array  # [B, L, C]
  start: int | None  # Column of the window's first key.
  token_mask: jax.Array  # [B, L]


def init_window_state(
  cfg: config.ModelConfig,
  how: recurrence_config.RecurrenceConfig,
  rows: int,
  window: int,
  states: tuple[jax.Array, ...] = (),
) -> WindowState:
  """Before the first window of every row."""
  states = tuple(s.s for s in cache_lib.init_states(cfg, rows, states))
  columns = window if how.eviction == 'sliding' else 0
  cache = cache_lib.init_cache(cfg, rows, columns)
  return WindowState(states, tuple(cache.k), tuple(cache.v), cache.positions)


def _window_mask(
  cfg: config.ModelConfig,
  how: recurrence_config.RecurrenceConfig,
  kept: WindowState,
  present_BxL: jax.Array,
  first: jax.Array,
) -> WindowMask:
  """Positions of a window whose first token is number `first` of its row.

  Under hard eviction they begin anew, to the bits of a model that never slept.
  """
  at = jnp.arange(present_BxL.shape[1])
  if how.eviction == 'sliding':
    at += first
  at = jnp.where(present_BxL, at, positions_lib.PAD_POSITION)
  keys, start = at, None
  if how.eviction == 'sliding':
    start = kept.positions.shape[1]
    keys = jnp.concatenate([kept.positions, at], axis=1)
  apart = at[..., None] - keys[:, None]
  seen = (apart >= 0) & (keys[:, None] != positions_lib.PAD_POSITION)
  if how.eviction == 'sliding':
    seen &= apart < start
  turn = layers_lib.rope_cos_sin(
    at, cfg.resolved_head_dim, cfg.rope_theta, cfg.rope_scaling
  )
  return WindowMask(turn, seen, start, present_BxL)


def _layer_caches(
  cfg: config.ModelConfig, kept: WindowState, frame: WindowMask, states
) -> tuple[jax.Array, ...]:
  """What every layer begins a pass with: room for the window's keys, or S."""
  begun = cache_lib.init_states(cfg, len(frame.token_mask), states)
  if frame.start is None:
    attended = [None] * len(cfg.layers_with(attention=True))
  else:
    room = frame.token_mask.shape[1]

    def widen(x: jax.Array, axis: int) -> jax.Array:
      pads = [(0, 0)] * 4
      pads[axis] = (0, room)
      return jnp.pad(x, pads)

    attended = [(widen(k, 3), widen(v, 2)) for k, v in zip(kept.k, kept.v)]
  return cache_lib.interleave(cfg, attended, begun)


def _embed(cfg: config.ModelConfig, params: at.Params, tokens: jax.Array):
  return params['embed']['embedding'][tokens].astype(cfg.dtype)


def loop_window(
  cfg: config.ModelConfig,
  how: recurrence_config.RecurrenceConfig,
  params: at.Params,
  views: tuple[cms.LayerMemory, ...] | None,
  kept: WindowState,
  tokens_BxL: jax.Array,
  present_BxL: jax.Array,
  first: jax.Array,
) -> tuple[WindowState, jax.Array]:
  """N passes over one window, after which its features and keys are dropped.

  Returns:
    What it leaves, and the passes that each row took, `[B]`.
  """
  frame = _window_mask(cfg, how, kept, present_BxL, first)
  looped = how.looped_layers(cfg.layers)
  stack = functools.partial(
    layer_stack.Stack(cfg).apply, {'params': params['blocks']}
  )

  def blocks(x, states, span):
    """One pass over some of the blocks."""
    pasts = _layer_caches(cfg, kept, frame, states)
    x, pasts, _ = stack(
      x,
      views,
      pasts,
      frame.turn,
      frame.seen,
      frame.start,
      frame.token_mask,
      span,
    )
    k, v, begun = cache_lib.split_by_mixer(cfg, pasts)
    return x, tuple(state.s for state in begun), (k, v)

  x = _embed(cfg, params, tokens_BxL)
  found, parts = kept.states, []
  if looped.start:
    before = range(looped.start)
    x, found, keys = blocks(x, found, before)
    parts.append((before, keys))
  x_first = x

  def one_pass(carry, _):
    x, states = carry
    y, states, keys = blocks(
      x if how.carry_features else x_first,
      states if how.carry_states else found,
      looped,
    )
    return (y, states), ((states, y) if how.halting else None, keys)

  (x, states), (after, keys) = jax.lax.scan(
    one_pass, (x, found), length=how.passes
  )
  passes = jnp.full(len(x), float(how.passes))
  if how.halting:
    weight = halting.halting_probs(params['halt'], after[1], present_BxL)
    states = tuple(jnp.einsum('nb,nbhkv->bhkv', weight, s) for s in after[0])
    passes = jnp.arange(1, how.passes + 1) @ weight
  parts.append((looped, jax.tree.map(lambda leaf: leaf[-1], keys)))
  if looped.stop < cfg.layers:
    after_loop = range(looped.stop, cfg.layers)
    _, states, keys = blocks(x, states, after_loop)
    parts.append((after_loop, keys))
  k, v = _own_keys(cfg, parts)
  return next_window_state(
    kept, frame, present_BxL, first, states, k, v
  ), passes


def _own_keys(cfg: config.ModelConfig, parts) -> tuple[tuple[jax.Array, ...]]:
  """Keys and values of every layer, from the part that computed the layer.

  A part hands the keys of all others on as it found them: without this window.
  """
  attended = cfg.layers_with(attention=True)
  pairs = [
    (keys[0][at], keys[1][at])
    for span, keys in parts
    for at, layer in enumerate(attended)
    if layer in span and keys[0]
  ]
  return tuple(zip(*pairs)) or ((), ())


def next_window_state(kept, frame, present, first, states, k, v) -> WindowState:
  """The window is over: states stay, and of the keys at most the newest."""
  if frame.start is None:
    return kept.replace(states=states)  # Nothing else stays.
  length = frame.start
  at = first + jnp.arange(present.shape[1])
  at = jnp.where(present, at, positions_lib.PAD_POSITION)
  positions = jnp.concatenate([kept.positions, at], axis=1)
  return WindowState(
    states,
    tuple(x[..., -length:] for x in k),
    tuple(x[..., -length:, :] for x in v),
    positions[:, -length:],
  )


def read(
  cfg: config.ModelConfig,
  how: recurrence_config.RecurrenceConfig,
  params: at.Params,
  views: tuple[cms.LayerMemory, ...] | None,
  kept: WindowState,
  windows: at.Int[jax.Array, 'B J L'],
  token_mask: at.Bool[jax.Array, 'B J L'],
) -> tuple[WindowState, jax.Array]:
  """Reads window after window, sleeping on each before it is evicted.

  Gradients flow through all windows and all passes. With `how.remat` a window's
  activations are computed anew for them: memory holds one window's at a time.

  Returns:
    What the last window leaves, and the mean passes of each row `[B]`.
  """
  length = windows.shape[2]

  def step(carry, window):
    kept, first = carry
    kept, passes = loop_window(cfg, how, params, views, kept, *window, first)
    return (kept, first + length), passes

  if how.remat:
    step = jax.checkpoint(step, prevent_cse=False)
  xs = (windows.swapaxes(0, 1), present.swapaxes(0, 1))
  (kept, _), passes = jax.lax.scan(step, (kept, jnp.zeros((), int)), xs)
  return kept, passes.mean(0)


def predict(
  cfg: config.ModelConfig,
  how: recurrence_config.RecurrenceConfig,
  params: at.Params,
  views: tuple[cms.LayerMemory, ...] | None,
  kept: WindowState,
  tokens: at.Int[jax.Array, 'B P'],
  token_mask: at.Bool[jax.Array, 'B P'],
  first: jax.Array | int,
) -> jax.Array:
  """One pass, from what is kept: logits `[B, P, V]`."""
  if how.eviction == 'hard':
    at = jnp.arange(tokens.shape[1])
    at = jnp.where(present, at, positions_lib.PAD_POSITION)
    return _forward(cfg, params, views, tokens, at, kept.states)
  frame = _window_mask(cfg, how, kept, present, first)
  pasts = _layer_caches(cfg, kept, frame, kept.states)
  x, *_ = layer_stack.Stack(cfg).apply(
    {'params': params['blocks']},
    _embed(cfg, params, tokens),
    views,
    pasts,
    frame.turn,
    frame.seen,
    frame.start,
    frame.token_mask,
  )
  hidden = layers_lib.RMSNorm(cfg.norm_eps).apply({'params': params['norm']}, x)
  return (
    hidden @ transformer.unembedding(cfg, params).T.astype(x.dtype)
  ).astype(jnp.float32)


def _forward(cfg, params, views, tokens, positions, states) -> jax.Array:
  """The plain hybrid, from given states."""
  out = transformer.Decoder(cfg).apply(
    {'params': params}, tokens, views, positions, None, None, states
  )
  return out.logits
