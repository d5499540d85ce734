"""Offline recurrence into fast weights (arXiv 2605.26099, Algorithm 1).

A hybrid of attention and linear recurrence reads its stream in windows. Before
a window's keys and values are evicted, the blocks pass over it N times: from
pass to pass go the features and the recurrent states, after the last only the
states stay. A prediction is always one pass. Nothing is trained at this time;
that the states come to hold what a later question needs is learnt beforehand,
by back-propagation through windows and passes.
"""

from typing import Any

import jax
import jax.numpy as jnp

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.lifecycle.recurrence import config as recurrence_config
from sleep_jax.lifecycle.recurrence import halting
from sleep_jax.models import block as block_lib
from sleep_jax.models import cache as cache_lib
from sleep_jax.models import cms
from sleep_jax.models import layers as layers_lib
from sleep_jax.models import memory as memory_lib
from sleep_jax.models import model as model_lib
from sleep_jax.models import positions as positions_lib
from sleep_jax.models import segments
from sleep_jax.models import transformer
from sleep_jax.models.kernels import attention
from sleep_jax.models.mixers import base as mixers_base

States = tuple[jax.Array, ...]  # Of the recurrent layers, [B, H, K, V] each.
KVCaches = tuple[Any, ...]  # (keys, values) of the attention layers, or None.


class WindowState(at.Pytree):
  """What a window leaves to the next.

  states: of the recurrent layers, [B, H, K, V] each.
  k, v, positions: of the window before, under `sliding`; else empty.
  """

  states: States
  k: tuple[jax.Array, ...]
  v: tuple[jax.Array, ...]
  positions: at.Int[jax.Array, 'B C']


def init_window_state(
  cfg: recurrence_config.RecurrenceConfig,
  model: model_lib.Model,
  rows: int,
  window: int,
) -> WindowState:
  """Before the first window of every row, with the states of the memory."""
  columns = window if cfg.eviction == 'sliding' else 0
  cache = cache_lib.init_cache(model.cfg, rows, columns)
  layers = cache_lib.with_states(
    model.cfg, cache.layers, cache_lib.broadcast_states(model.memory, rows)
  )
  states = cache_lib.recurrent_states(model.cfg, layers)
  k, v = tuple(zip(*cache_lib.kv_caches(model.cfg, layers))) or ((), ())
  return WindowState(states, k, v, cache.positions)


def read(
  cfg: recurrence_config.RecurrenceConfig,
  model: model_lib.Model,
  state: WindowState,
  windows: at.Int[at.Array, 'B J L'],
  token_mask: at.Bool[at.Array, 'B J L'],
) -> tuple[WindowState, at.Float[jax.Array, 'B']]:
  """Reads window after window, passing over each before it is evicted.

  Gradients flow through all windows and all passes. With `cfg.remat` a window's
  activations are computed anew for them: memory holds one window's at a time.

  Returns:
    What the last window leaves, and the mean passes of each row.
  """
  length = windows.shape[2]

  def step(carry, window):
    state, first = carry
    tokens, mask = window
    state, passes = loop_window(cfg, model, state, tokens, mask, first)
    return (state, first + length), passes

  if cfg.remat:
    step = jax.checkpoint(step, prevent_cse=False)
  xs = (windows.swapaxes(0, 1), token_mask.swapaxes(0, 1))
  (state, _), passes = jax.lax.scan(step, (state, jnp.zeros((), int)), xs)
  return state, passes.mean(0)


def loop_window(
  cfg: recurrence_config.RecurrenceConfig,
  model: model_lib.Model,
  state: WindowState,
  tokens_BxL: jax.Array,
  token_mask_BxL: jax.Array,
  first: jax.Array,
) -> tuple[WindowState, at.Float[jax.Array, 'B']]:
  """N passes over one window, after which its features and keys are dropped.

  Args:
    cfg: the passes, and which layers are looped.
    model: a hybrid.
    state: what the window before has left.
    tokens_BxL: the window.
    token_mask_BxL: False on padding.
    first: number of its first token in the row.

  Returns:
    What it leaves, and the passes that each row took.
  """
  layers, looped = model.cfg.layers, cfg.looped_layers(model.cfg.layers)
  inputs = _mixer_inputs(cfg, model.cfg, state, token_mask_BxL, first)
  x, states, keys_by_part = _embed(model, tokens_BxL), state.states, []
  if looped.start:
    before_loop = range(looped.start)
    x, states, keys = _apply(model, state, inputs, x, states, before_loop)
    keys_by_part.append((before_loop, keys))
  x_initial, initial_states = x, states

  def one_pass(carry, _):
    x, states = carry
    x, states, keys = _apply(
      model,
      state,
      inputs,
      x if cfg.carry_features else x_initial,
      states if cfg.carry_states else initial_states,
      looped,
    )
    return (x, states), ((states, x) if cfg.halting else None, keys)

  (x, states), (after_pass, keys) = jax.lax.scan(
    one_pass, (x, states), length=cfg.passes
  )
  passes = jnp.full(len(x), float(cfg.passes))
  if after_pass is not None:  # Under `cfg.halting`.
    states_of_pass, features = after_pass
    weight = halting.halting_probs(
      model.params['halt'], features, token_mask_BxL
    )
    states = tuple(
      jnp.einsum('nb,nbhkv->bhkv', weight, s) for s in states_of_pass
    )
    passes = jnp.arange(1, cfg.passes + 1) @ weight
  keys_by_part.append((looped, jax.tree.map(lambda leaf: leaf[-1], keys)))
  if looped.stop < layers:
    after_loop = range(looped.stop, layers)
    _, states, keys = _apply(model, state, inputs, x, states, after_loop)
    keys_by_part.append((after_loop, keys))
  keys = _keys_of_layers(model.cfg, keys_by_part)
  return next_window_state(state, inputs, first, states, keys), passes


def predict(
  cfg: recurrence_config.RecurrenceConfig,
  model: model_lib.Model,
  state: WindowState,
  tokens: at.Int[at.Array, 'B P'],
  token_mask: at.Bool[at.Array, 'B P'],
  first: jax.Array | int,
) -> at.Float[jax.Array, 'B P V']:
  """Logits after one pass, from what the last window has left."""
  tokens, token_mask = jnp.asarray(tokens), jnp.asarray(token_mask)
  if cfg.eviction == 'hard':
    positions = jnp.arange(tokens.shape[1])
    positions = jnp.where(token_mask, positions, positions_lib.PAD_POSITION)
    memory = model.memory or memory_lib.of_states(model.cfg, ())
    return transformer.forward(
      model.cfg,
      model.params,
      tokens,
      memory.replace(states=state.states),
      positions=positions,
    ).logits
  inputs = _mixer_inputs(cfg, model.cfg, state, token_mask, first)
  x, *_ = _apply(
    model,
    state,
    inputs,
    _embed(model, tokens),
    state.states,
    range(model.cfg.layers),
  )
  norm = layers_lib.RMSNorm(model.cfg.norm_eps)
  hidden = layers_lib.apply(norm, model.params['norm'], x)
  logits = hidden @ model.unembedding().T.astype(x.dtype)
  return logits.astype(jnp.float32)


def next_window_state(
  state: WindowState,
  inputs: mixers_base.MixerInputs,
  first: jax.Array,
  states: States,
  keys: tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]],
) -> WindowState:
  """What stays of a window: the states, and under `sliding` its keys."""
  length = inputs.cache_index
  if length is None:
    return state.replace(states=states)
  token_mask = inputs.token_mask
  positions = first + jnp.arange(token_mask.shape[1])
  positions = jnp.where(token_mask, positions, positions_lib.PAD_POSITION)
  positions = jnp.concatenate([state.positions, positions], axis=1)
  k, v = keys
  return WindowState(
    states,
    tuple(x[..., -length:] for x in k),
    tuple(x[..., -length:, :] for x in v),
    positions[:, -length:],
  )


def _embed(model: model_lib.Model, tokens: jax.Array) -> jax.Array:
  embedding = model.params['embed']['embedding']
  return embedding[tokens].astype(model.cfg.dtype)


def _mixer_inputs(
  cfg: recurrence_config.RecurrenceConfig,
  model_cfg: config.ModelConfig,
  state: WindowState,
  token_mask_BxL: jax.Array,
  first: jax.Array | int,
) -> mixers_base.MixerInputs:
  """Positions and mask of a window whose first token is number `first`.

  Under hard eviction positions begin anew with every window, so that one pass
  is the plain hybrid to the bit.
  """
  positions = jnp.arange(token_mask_BxL.shape[1])
  if cfg.eviction == 'sliding':
    positions += first
  positions = jnp.where(token_mask_BxL, positions, positions_lib.PAD_POSITION)
  key_positions, cache_index = positions, None
  if cfg.eviction == 'sliding':
    cache_index = state.positions.shape[1]
    key_positions = jnp.concatenate([state.positions, positions], axis=1)
  mask = attention.mask(
    positions_lib.PositionMask(positions, key_positions, window=cache_index)
  )
  rope = layers_lib.rope_cos_sin(
    positions,
    model_cfg.resolved_head_dim,
    model_cfg.rope_theta,
    model_cfg.rope_scaling,
  )
  return mixers_base.MixerInputs(rope, mask, cache_index, token_mask_BxL)


def _apply(
  model: model_lib.Model,
  state: WindowState,
  inputs: mixers_base.MixerInputs,
  x: jax.Array,
  states: States,
  layer_range: range,
) -> tuple[jax.Array, States, KVCaches]:
  """One pass over some of the layers: features, states, keys and values."""
  caches = _layer_caches(model.cfg, state, inputs, states)
  memory = None
  if model.memory is not None:
    memory = cms.per_layer_memory(model.memory)
  x, caches, _ = layers_lib.apply(
    segments.stack(model.cfg),
    model.params['blocks'],
    x,
    block_lib.LayerInputs(memory, caches, None),
    inputs,
    layer_range,
  )
  kv_caches = cache_lib.kv_caches(model.cfg, caches)
  return x, cache_lib.recurrent_states(model.cfg, caches), kv_caches


def _layer_caches(
  cfg: config.ModelConfig,
  state: WindowState,
  inputs: mixers_base.MixerInputs,
  states: States,
) -> tuple[Any, ...]:
  """What every layer begins a pass with: space for the window's keys, or S."""
  rows, length = inputs.token_mask.shape
  # A model without recurrent layers is refused before, see `training.check`.
  caches = cache_lib.init_layer_caches(cfg, rows, states) or ()
  if inputs.cache_index is None:
    return caches

  def widen(x: jax.Array, axis: int) -> jax.Array:
    pads = [(0, 0)] * 4
    pads[axis] = (0, length)
    return jnp.pad(x, pads)

  kv_caches = [(widen(k, 3), widen(v, 2)) for k, v in zip(state.k, state.v)]
  return cache_lib.with_kv_caches(cfg, caches, kv_caches)


def _keys_of_layers(
  cfg: config.ModelConfig, keys_by_part: list[tuple[range, KVCaches]]
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
  """Keys and values of every layer, from the part that computed the layer.

  A part returns the keys of all other layers unchanged: without this window.
  """
  pairs = [
    kv_caches[number]
    for layer_range, kv_caches in keys_by_part
    for number, layer in enumerate(cfg.attention_layers)
    if layer in layer_range and kv_caches[number] is not None
  ]
  k, v = tuple(zip(*pairs)) or ((), ())
  return k, v
