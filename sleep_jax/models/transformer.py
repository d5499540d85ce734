"""A Llama-shaped decoder whose feed-forward part is the CMS.

Tokens are mixed by attention, or, in a hybrid (`cfg.mixers`), by attention in
some layers and by a linear recurrence in others.

The module is used as a pure function: `apply(params, tokens, memory, cache)`.
Nothing is stored inside; memory and cache go in and come out.
"""

import functools
from typing import Any

from flax import linen as nn
from flax import struct
import jax
import jax.numpy as jnp

from sleep_jax import config
from sleep_jax import typing as t
from sleep_jax.models import attention
from sleep_jax.models import cms
from sleep_jax.models import deltanet
from sleep_jax.models import lora
from sleep_jax.models import memory as memory_lib

PAD_POSITION = -1  # A cache entry or token that nobody may attend to.


@struct.dataclass
class Cache:
  """Keys and values of what was read; `next` is the first free column."""

  # Of the layers that attend; `decoding` and hybrids have a tuple over L.
  k: t.Float[jax.Array, 'L B K E C']
  v: t.Float[jax.Array, 'L B K C E']
  positions: t.Int[jax.Array, 'B C']
  next: t.Int[jax.Array, '']
  # Of the layers that recur; their size does not grow with what was read.
  states: tuple[deltanet.State, ...] = ()


@struct.dataclass
class Output:
  """What a forward pass tells."""

  logits: t.Float[jax.Array, 'B T V']
  hidden: t.Float[jax.Array, 'B T D']  # After the final norm.
  # Per level, logits [L, B, T, S] over the layers that the level has.
  routes: tuple[jax.Array | None, ...]
  cache: Cache | None
  # What the recurrent layers hold after the last token, [B, H, K, V] each.
  states: tuple[jax.Array, ...] = ()


def fresh_cache(
  cfg: config.ModelConfig,
  rows: int,
  capacity: int,
  memory: memory_lib.Memory | None = None,
) -> Cache:
  """An empty cache for `rows` rows of up to `capacity` tokens.

  The recurrent layers of a hybrid begin with what `memory` holds.
  """
  layers = cfg.layers_with(attention=True)
  shape = (len(layers), rows, cfg.num_kv_heads)
  k = jnp.zeros((*shape, cfg.size_of_head, capacity), cfg.dtype)
  v = jnp.zeros((*shape, capacity, cfg.size_of_head), cfg.dtype)
  return Cache(
    k=tuple(k) if cfg.mixers else k,
    v=tuple(v) if cfg.mixers else v,
    positions=jnp.full((rows, capacity), PAD_POSITION, jnp.int32),
    next=jnp.zeros((), jnp.int32),
    states=begin(cfg, rows, states_of(memory, rows)),
  )


def states_of(
  memory: memory_lib.Memory | None, rows: int
) -> tuple[jax.Array, ...]:
  """A memory's recurrent states for each of `rows` rows, [B, H, K, V].

  A life has one for all its rows; a memory may also hold one for each.
  """
  if memory is None:
    return ()
  return tuple(
    s if s.ndim == 4 else jnp.broadcast_to(s, (rows, *s.shape))
    for s in memory.states
  )


def begin(
  cfg: config.ModelConfig, rows: int, states: tuple[jax.Array, ...] = ()
) -> tuple[deltanet.State, ...]:
  """How the recurrent layers begin a window; without `states`, empty."""
  layers = cfg.layers_with(attention=False)
  fresh = [deltanet.fresh_state(cfg, cfg.mixer(i), rows) for i in layers]
  if not states:
    return tuple(fresh)
  return tuple(f.replace(s=s) for f, s in zip(fresh, states, strict=True))


class Block(nn.Module):
  """A mixer, then the chain of levels from fast to slow (Sleep Eq. 1)."""

  cfg: config.ModelConfig
  levels: tuple[config.LevelConfig, ...]
  mixer: str = 'attention'

  @nn.compact
  def __call__(self, x, scanned, turn, seen, start, present=None):
    views, past, adapter = scanned
    norm = functools.partial(attention.RMSNorm, self.cfg.norm_eps)
    if self.mixer == 'attention':
      past = None if past is None else (*past, start)
      y, kept = attention.Attention(self.cfg, name='attention')(
        norm(name='attention_norm')(x), turn, seen, past, adapter
      )
    else:
      y, kept = deltanet.GatedDelta(self.cfg, self.mixer, name='recurrence')(
        norm(name='recurrence_norm')(x), past, present
      )
    x = x + y
    routes = []
    for i, level in enumerate(self.levels, 1):
      y, logits = cms.Level(self.cfg, level, name=f'level_{i}')(
        norm(name=f'level_{i}_norm')(x),
        None if views is None else views[i - 1],
        adapter,
      )
      x = x + y
      routes.append(logits)
    return x, (kept, tuple(routes))


class Stack(nn.Module):
  """The blocks of a hybrid, one after the other: each has its own mixer."""

  cfg: config.ModelConfig

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    views: tuple[cms.LevelView, ...] | None,
    pasts: tuple[Any, ...],
    turn: tuple[jax.Array, jax.Array],
    seen: jax.Array,
    start: jax.Array | None,
    present: jax.Array,
    span: range | None = None,
  ) -> tuple[jax.Array, tuple[Any, ...], tuple[jax.Array | None, ...]]:
    """The layers of `span` (all), which is how a part is looped.

    `pasts` has one entry for every layer of the model: keys and values, or the
    state; what replaces it comes back, beside x and the routes.
    """
    c, kept, routes = self.cfg, list(pasts), []
    block = nn.remat(Block, prevent_cse=False) if c.remat else Block
    for i in span or range(c.layers):
      view = None
      if views is not None:
        view = jax.tree.map(lambda leaf, i=i: leaf[i], views)
      x, (kept[i], logits) = block(c, c.levels, c.mixer(i), name=f'block_{i}')(
        x, (view, pasts[i], None), turn, seen, start, present
      )
      routes.append(logits)
    routes = tuple(
      None if level[0] is None else jnp.stack(level)
      for level in zip(*routes, strict=True)
    )
    return x, tuple(kept), routes


def by_layer(cfg: config.ModelConfig, attended, recurred) -> tuple[Any, ...]:
  """One entry a layer, from those of either kind in their order."""
  kinds = {'attention': iter(attended)}
  recurred = iter(recurred)
  return tuple(
    next(kinds.get(cfg.mixer(i), recurred)) for i in range(cfg.layers)
  )


def by_kind(cfg: config.ModelConfig, pasts: tuple[Any, ...]):
  """`by_layer` undone: keys and values if they were kept, and states."""
  attended = [pasts[i] for i in cfg.layers_with(attention=True)]
  k, v = tuple(zip(*filter(None, attended))) or ((), ())
  return k, v, tuple(pasts[i] for i in cfg.layers_with(attention=False))


class Decoder(nn.Module):
  """Tokens in, logits out; see `forward`, or `decoding` for `unrolled`."""

  cfg: config.ModelConfig
  unrolled: bool = False

  @nn.compact
  def __call__(
    self, tokens, views, positions, cache, adapter=None, states=()
  ) -> Output:
    c = self.cfg
    embed = nn.Embed(
      c.vocab,
      c.dim,
      dtype=jnp.dtype(c.dtype),
      name='embed',
      embedding_init=nn.initializers.normal(0.02),
    )
    x = embed(tokens)
    key_positions, start = positions, None
    if cache is not None:
      key_positions = jax.lax.dynamic_update_slice_in_dim(
        cache.positions, positions, cache.next, axis=1
      )
      start = cache.next
    past = None if cache is None else (cache.k, cache.v)
    if c.mixers:
      begun = begin(c, len(tokens), states) if cache is None else cache.states
      attended = [None] * c.layers if past is None else zip(*past)
      past = by_layer(c, attended, begun)
    turn = attention.rotation(
      positions, c.size_of_head, c.rope_theta, c.rope_scaling
    )
    seen = (key_positions[:, None] <= positions[..., None]) & (
      key_positions[:, None] != PAD_POSITION
    )
    layers = self._scanned
    if c.mixers:
      layers = functools.partial(self._mixed, present=positions != PAD_POSITION)
    elif self.unrolled:
      layers = self._unrolled
    elif c.partition and views is not None:
      layers = self._level_by_level
    x, (kept, routes) = layers(x, (views, past, adapter), (turn, seen, start))
    if views is None:
      routes = (None,) * len(c.levels)
    if self.unrolled:  # A sampler asks for the last column alone.
      x = x[:, -1:]
    hidden = attention.RMSNorm(c.norm_eps, name='norm')(x)
    if c.tie_embeddings:
      logits = embed.attend(hidden)
    else:
      logits = nn.Dense(
        c.vocab, use_bias=False, dtype=hidden.dtype, name='head'
      )(hidden)
    if c.mixers:
      *kept, begun = by_kind(c, kept)
      states = tuple(state.s for state in begun)
    if cache is not None:
      cache = cache.replace(
        k=kept[0],
        v=kept[1],
        positions=key_positions,
        next=cache.next + tokens.shape[1],
        states=begun if c.mixers else (),
      )
    logits = logits.astype(jnp.float32)
    return Output(logits, hidden, routes, cache, states)

  def _mixed(self, x, scanned, shared, present):
    """The blocks of a hybrid."""
    views, pasts, adapter = scanned
    if adapter is not None:
      raise config.ConfigError(
        f'model.mixers={self.cfg.mixers}: low-rank adapters are for models of '
        'attention alone; leave out dreaming, or the mixers.'
      )
    x, kept, routes = Stack(self.cfg, name='blocks')(
      x, views, pasts, *shared, present
    )
    return x, (kept, routes)

  def _scanned(self, x, scanned, shared):
    """All blocks as one scan over stacked weights and memory."""
    c = self.cfg
    block = nn.remat(Block, prevent_cse=False) if c.remat else Block
    return nn.scan(
      block,
      variable_axes={'params': 0},
      split_rngs={'params': True},
      in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
      length=c.layers,
      unroll=min(c.unroll, c.layers),
    )(c, c.chain, name='blocks')(x, scanned, *shared)

  def _level_by_level(self, x, scanned, shared):
    """The blocks under `partition`: one scan a level, over its own layers.

    A level's memory differs in shape from the next one's. The weights stay one
    stack that every scan indexes: a slice of it would be a copy.
    """
    c = self.cfg
    views, past, adapter = scanned
    stack = self.variables['params']['blocks']
    kept, routes = [], []
    for i, (level, view) in enumerate(zip(c.levels, views, strict=True)):
      block = Block(c, (level,), parent=None)
      own = c.layers_of(i)

      def body(x, scanned, block=block):
        layer, view, *rest = scanned
        params = jax.tree.map(
          lambda w: jax.lax.dynamic_index_in_dim(w, layer, keepdims=False),
          stack,
        )
        return block.apply({'params': params}, x, ((view,), *rest), *shared)

      if c.remat:
        body = jax.checkpoint(body, prevent_cse=False)
      rest = jax.tree.map(
        lambda leaf, own=own: leaf[own.start : own.stop], (past, adapter)
      )
      x, (columns, logits) = jax.lax.scan(
        body,
        x,
        (jnp.arange(c.layers)[own.start : own.stop], view, *rest),
        unroll=min(c.unroll, len(own)),
      )
      kept.append(columns)
      routes += logits
    kept = jax.tree.map(lambda *parts: jnp.concatenate(parts), *kept)
    return x, (kept, tuple(routes))

  def _unrolled(self, x, scanned, shared):
    """Block by block, each with buffers of its own; see `decoding.py`."""
    c, kept = self.cfg, []
    views, past, _ = scanned
    for i, view in enumerate(views):
      block = Block(c, c.levels_at(i), name=f'block_{i}')
      x, (new, _) = block(x, (view, (past[0][i], past[1][i]), None), *shared)
      kept.append(new)
    return x, (tuple(zip(*kept)), ())


def forward(
  cfg: config.ModelConfig,
  params: t.Params,
  tokens: jax.Array,
  memory: memory_lib.Memory | None = None,
  *,
  positions: jax.Array | None = None,
  cache: Cache | None = None,
  adapter: lora.Adapter | None = None,
  states: tuple[jax.Array, ...] | None = None,
) -> Output:
  """One forward pass.

  Args:
    cfg: the model.
    params: backbone weights, as `init` gives them.
    tokens: `[B, T]`.
    memory: fast weights and experts; None computes the bare backbone.
    positions: `[B, T]`, PAD_POSITION where a token is padding; default
      0..T-1, or continuing after the cache's columns.
    cache: keys and values of earlier columns; its space must suffice.
    adapter: low-rank changes of the backbone's matrices.
    states: of a hybrid without a cache, what its recurrent layers begin with,
      [B, H, K, V] each; default those of the memory, for every row.

  Returns:
    The `Output`; `cache` holds the new columns if one was given.
  """
  if positions is None:
    first = 0 if cache is None else cache.next
    positions = jnp.broadcast_to(
      first + jnp.arange(tokens.shape[1]), tokens.shape
    )
  views = None if memory is None else cms.views(memory)
  if states is None:
    states = states_of(memory, tokens.shape[0])
  return Decoder(cfg).apply(
    {'params': params}, tokens, views, positions, cache, adapter, states
  )


def head(
  cfg: config.ModelConfig, params: t.Params
) -> t.Float[jax.Array, 'V D']:
  """The matrix that turns `Output.hidden` into logits."""
  if cfg.tie_embeddings:
    return params['embed']['embedding']
  return params['head']['kernel'].T


def init(cfg: config.ModelConfig, rng: t.Key) -> t.Params:
  """Fresh backbone weights."""
  tokens = jnp.zeros((1, 2), jnp.int32)
  positions = jnp.arange(2)[None]
  return Decoder(cfg).init(rng, tokens, None, positions, None)['params']


def count(params: t.Params) -> int:
  """Number of weights."""
  return sum(x.size for x in jax.tree.leaves(params))
