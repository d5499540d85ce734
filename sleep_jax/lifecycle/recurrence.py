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

from sleep_jax import config
from sleep_jax import typing as t
from sleep_jax.data import windows as windows_lib
from sleep_jax.models import attention
from sleep_jax.models import cms
from sleep_jax.models import memory as memory_lib
from sleep_jax.models import transformer


@struct.dataclass
class Kept:
  """What a window leaves to the next.

  states: of the recurrent layers, [B, H, K, V] each.
  k, v, positions: of the window before, under `sliding`; else empty.
  """

  states: tuple[jax.Array, ...]
  k: tuple[jax.Array, ...]
  v: tuple[jax.Array, ...]
  positions: t.Int[jax.Array, 'B C']


class _Frame(NamedTuple):
  """How the tokens of one window see each other, and those before."""

  turn: tuple[jax.Array, jax.Array]
  seen: jax.Array  # [B, L, C]
  start: int | None  # Column of the window's first key.
  present: jax.Array  # [B, L]


def begin(
  cfg: config.ModelConfig,
  how: config.RecurrenceConfig,
  rows: int,
  window: int,
  states: tuple[jax.Array, ...] = (),
) -> Kept:
  """Before the first window of every row."""
  states = tuple(s.s for s in transformer.begin(cfg, rows, states))
  columns = window if how.eviction == 'sliding' else 0
  cache = transformer.fresh_cache(cfg, rows, columns)
  return Kept(states, tuple(cache.k), tuple(cache.v), cache.positions)


def _frame(
  cfg: config.ModelConfig,
  how: config.RecurrenceConfig,
  kept: Kept,
  present_BxL: jax.Array,
  first: jax.Array,
) -> _Frame:
  """Positions of a window whose first token is number `first` of its row.

  Under hard eviction they begin anew, to the bits of a model that never slept.
  """
  at = jnp.arange(present_BxL.shape[1])
  if how.eviction == 'sliding':
    at += first
  at = jnp.where(present_BxL, at, transformer.PAD_POSITION)
  keys, start = at, None
  if how.eviction == 'sliding':
    start = kept.positions.shape[1]
    keys = jnp.concatenate([kept.positions, at], axis=1)
  apart = at[..., None] - keys[:, None]
  seen = (apart >= 0) & (keys[:, None] != transformer.PAD_POSITION)
  if how.eviction == 'sliding':
    seen &= apart < start
  turn = attention.rotation(
    at, cfg.size_of_head, cfg.rope_theta, cfg.rope_scaling
  )
  return _Frame(turn, seen, start, present_BxL)


def _pasts(
  cfg: config.ModelConfig, kept: Kept, frame: _Frame, states
) -> tuple[jax.Array, ...]:
  """What every layer begins a pass with: room for the window's keys, or S."""
  begun = transformer.begin(cfg, len(frame.present), states)
  if frame.start is None:
    attended = [None] * len(cfg.layers_with(attention=True))
  else:
    room = frame.present.shape[1]

    def widen(x: jax.Array, axis: int) -> jax.Array:
      pads = [(0, 0)] * 4
      pads[axis] = (0, room)
      return jnp.pad(x, pads)

    attended = [(widen(k, 3), widen(v, 2)) for k, v in zip(kept.k, kept.v)]
  return transformer.by_layer(cfg, attended, begun)


def _embed(cfg: config.ModelConfig, params: t.Params, tokens: jax.Array):
  return params['embed']['embedding'][tokens].astype(cfg.dtype)


def consolidate(
  cfg: config.ModelConfig,
  how: config.RecurrenceConfig,
  params: t.Params,
  views: tuple[cms.LevelView, ...] | None,
  kept: Kept,
  tokens_BxL: jax.Array,
  present_BxL: jax.Array,
  first: jax.Array,
) -> tuple[Kept, jax.Array]:
  """N passes over one window, after which its features and keys are dropped.

  Returns:
    What it leaves, and the passes that each row took, `[B]`.
  """
  frame = _frame(cfg, how, kept, present_BxL, first)
  looped = how.looped(cfg.layers)
  stack = functools.partial(
    transformer.Stack(cfg).apply, {'params': params['blocks']}
  )

  def blocks(x, states, span):
    """One pass over some of the blocks."""
    pasts = _pasts(cfg, kept, frame, states)
    x, pasts, _ = stack(
      x, views, pasts, frame.turn, frame.seen, frame.start, frame.present, span
    )
    k, v, begun = transformer.by_kind(cfg, pasts)
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
    weight = stopping(params['halt'], after[1], present_BxL)
    states = tuple(jnp.einsum('nb,nbhkv->bhkv', weight, s) for s in after[0])
    passes = jnp.arange(1, how.passes + 1) @ weight
  parts.append((looped, jax.tree.map(lambda leaf: leaf[-1], keys)))
  if looped.stop < cfg.layers:
    after_loop = range(looped.stop, cfg.layers)
    _, states, keys = blocks(x, states, after_loop)
    parts.append((after_loop, keys))
  k, v = _own_keys(cfg, parts)
  return _leave(kept, frame, present_BxL, first, states, k, v), passes


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


def _leave(kept, frame, present, first, states, k, v) -> Kept:
  """The window is over: states stay, and of the keys at most the newest."""
  if frame.start is None:
    return kept.replace(states=states)  # Nothing else stays.
  length = frame.start
  at = first + jnp.arange(present.shape[1])
  at = jnp.where(present, at, transformer.PAD_POSITION)
  positions = jnp.concatenate([kept.positions, at], axis=1)
  return Kept(
    states,
    tuple(x[..., -length:] for x in k),
    tuple(x[..., -length:, :] for x in v),
    positions[:, -length:],
  )


def fresh_halt(cfg: config.ModelConfig) -> t.Params:
  """The rule that stops a window, before it has learnt: odds of 1 to 3."""
  return {'kernel': jnp.zeros((cfg.dim,)), 'bias': jnp.array(-1.1)}


def stopping(
  halt: t.Params, features: t.Float[jax.Array, 'N B L D'], present: jax.Array
) -> t.Float[jax.Array, 'N B']:
  """The probability that a window stops after pass n, from its features.

  In training states are mixed by it (so a gradient tells when more passes were
  worth their price); `harden` makes it a decision.
  """
  share = present / jnp.maximum(present.sum(-1, keepdims=True), 1)
  norm = jax.lax.rsqrt(jnp.mean(features**2, -1, keepdims=True) + 1e-5)
  pooled = jnp.einsum('nbld,bl->nbd', features * norm, share)
  p = jax.nn.sigmoid(pooled @ halt['kernel'] + halt['bias'])
  p = jnp.where(halt.get('hard', False), (p > 0.5).astype(p.dtype), p)
  p = p.at[-1].set(1.0)
  going = jnp.cumprod(1.0 - p, axis=0)
  return p * jnp.concatenate([jnp.ones_like(p[:1]), going[:-1]])


def harden(params: t.Params) -> t.Params:
  """Weights under which `halting` decides: each window stops at one pass."""
  return params | {'halt': params['halt'] | {'hard': jnp.array(True)}}


def read(
  cfg: config.ModelConfig,
  how: config.RecurrenceConfig,
  params: t.Params,
  views: tuple[cms.LevelView, ...] | None,
  kept: Kept,
  windows: t.Int[jax.Array, 'B J L'],
  present: t.Bool[jax.Array, 'B J L'],
) -> tuple[Kept, jax.Array]:
  """Reads window after window, sleeping on each before it is evicted.

  Gradients flow through all windows and all passes. With `how.remat` a window's
  activations are computed anew for them: memory holds one window's at a time.

  Returns:
    What the last window leaves, and the mean passes of each row `[B]`.
  """
  length = windows.shape[2]

  def step(carry, window):
    kept, first = carry
    kept, passes = consolidate(cfg, how, params, views, kept, *window, first)
    return (kept, first + length), passes

  if how.remat:
    step = jax.checkpoint(step, prevent_cse=False)
  xs = (windows.swapaxes(0, 1), present.swapaxes(0, 1))
  (kept, _), passes = jax.lax.scan(step, (kept, jnp.zeros((), int)), xs)
  return kept, passes.mean(0)


def predict(
  cfg: config.ModelConfig,
  how: config.RecurrenceConfig,
  params: t.Params,
  views: tuple[cms.LevelView, ...] | None,
  kept: Kept,
  tokens: t.Int[jax.Array, 'B P'],
  present: t.Bool[jax.Array, 'B P'],
  first: jax.Array | int,
) -> jax.Array:
  """One pass, from what is kept: logits `[B, P, V]`."""
  if how.eviction == 'hard':
    at = jnp.arange(tokens.shape[1])
    at = jnp.where(present, at, transformer.PAD_POSITION)
    return _forward(cfg, params, views, tokens, at, kept.states)
  frame = _frame(cfg, how, kept, present, first)
  pasts = _pasts(cfg, kept, frame, kept.states)
  x, *_ = transformer.Stack(cfg).apply(
    {'params': params['blocks']},
    _embed(cfg, params, tokens),
    views,
    pasts,
    frame.turn,
    frame.seen,
    frame.start,
    frame.present,
  )
  hidden = attention.RMSNorm(cfg.norm_eps).apply({'params': params['norm']}, x)
  return (hidden @ transformer.head(cfg, params).T.astype(x.dtype)).astype(
    jnp.float32
  )


def _forward(cfg, params, views, tokens, positions, states) -> jax.Array:
  """The plain hybrid, from given states."""
  out = transformer.Decoder(cfg).apply(
    {'params': params}, tokens, views, positions, None, None, states
  )
  return out.logits


class Verdict(NamedTuple):
  """What the model makes of the prediction windows of a batch."""

  loss: jax.Array  # Mean over the targets, nats; what training lowers.
  nll: jax.Array  # [B, P]
  chosen: jax.Array  # [B, P], the likeliest tokens.
  passes: jax.Array  # [B], mean over windows.


def judge(
  cfg: config.ModelConfig,
  how: config.RecurrenceConfig,
  params: t.Params,
  batch: windows_lib.Windows,
  memory: memory_lib.Memory | None = None,
) -> Verdict:
  """Algorithm 1: reads and sleeps through the context, then predicts."""
  rows, _, length = batch.context.shape
  views = None if memory is None else cms.views(memory)
  states = transformer.states_of(memory, rows)
  kept = begin(cfg, how, rows, length, states)
  kept, passes = read(
    cfg, how, params, views, kept, batch.context, batch.present
  )
  first = batch.context.shape[1] * length
  logits = predict(
    cfg, how, params, views, kept, batch.inputs, batch.asked, first
  )
  logp = jax.nn.log_softmax(logits)
  nll = -jnp.take_along_axis(logp, batch.targets[..., None], axis=-1)[..., 0]
  weight = batch.weight
  loss = (nll * weight).sum() / jnp.maximum(weight.sum(), 1.0)
  if how.halting:
    loss += how.ponder * passes.mean()
  return Verdict(loss, nll, logits.argmax(-1), passes)
