"""A Llama-shaped decoder whose feed-forward part is the CMS.

Tokens are mixed by attention, or, in a hybrid (`cfg.mixers`), by attention in
some layers and by a linear recurrence in others.

The module is used as a pure function: `apply(params, tokens, memory, cache)`.
Nothing is stored inside; memory and cache go in and come out.
"""

import functools

from flax import linen as nn
from flax import struct
import jax
import jax.numpy as jnp

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.models import block as block_lib
from sleep_jax.models import cache as cache_lib
from sleep_jax.models import cms
from sleep_jax.models import layer_stack
from sleep_jax.models import layers as layers_lib
from sleep_jax.models import lora
from sleep_jax.models import memory as memory_lib
from sleep_jax.models import positions as positions_lib


@struct.dataclass
class Output:
  """What a forward pass tells."""

  logits: at.Float[jax.Array, 'B T V']
  hidden: at.Float[jax.Array, 'B T D']  # After the final norm.
  # Per level, logits [L, B, T, S] over the layers that the level has.
  routes: tuple[jax.Array | None, ...]
  cache: cache_lib.Cache | None
  # What the recurrent layers hold after the last token, [B, H, K, V] each.
  states: tuple[jax.Array, ...] = ()


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
      begun = (
        cache_lib.init_states(c, len(tokens), states)
        if cache is None
        else cache.states
      )
      attended = [None] * c.layers if past is None else zip(*past)
      past = cache_lib.interleave(c, attended, begun)
    turn = layers_lib.rope_cos_sin(
      positions, c.resolved_head_dim, c.rope_theta, c.rope_scaling
    )
    seen = (key_positions[:, None] <= positions[..., None]) & (
      key_positions[:, None] != positions_lib.PAD_POSITION
    )
    layers = self._scanned
    if c.mixers:
      layers = functools.partial(
        self._mixed, token_mask=positions != positions_lib.PAD_POSITION
      )
    elif self.unrolled:
      layers = self._unrolled
    elif c.partition and views is not None:
      layers = self._level_by_level
    x, (kept, routes) = layers(x, (views, past, adapter), (turn, seen, start))
    if views is None:
      routes = (None,) * len(c.levels)
    if self.unrolled:  # A sampler asks for the last column alone.
      x = x[:, -1:]
    hidden = layers_lib.RMSNorm(c.norm_eps, name='norm')(x)
    if c.tie_embeddings:
      logits = embed.attend(hidden)
    else:
      logits = nn.Dense(
        c.vocab, use_bias=False, dtype=hidden.dtype, name='unembedding'
      )(hidden)
    if c.mixers:
      *kept, begun = cache_lib.split_by_mixer(c, kept)
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
    x, kept, routes = layer_stack.Stack(self.cfg, name='blocks')(
      x, views, pasts, *shared, present
    )
    return x, (kept, routes)

  def _scanned(self, x, scanned, shared):
    """All blocks as one scan over stacked weights and memory."""
    c = self.cfg
    block = (
      nn.remat(block_lib.Block, prevent_cse=False)
      if c.remat
      else block_lib.Block
    )
    return nn.scan(
      block,
      variable_axes={'params': 0},
      split_rngs={'params': True},
      in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
      length=c.layers,
      unroll=min(c.unroll, c.layers),
    )(c, c.levels_per_block, name='blocks')(x, scanned, *shared)

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
      block = block_lib.Block(c, (level,), parent=None)
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
      block = block_lib.Block(c, c.levels_at(i), name=f'block_{i}')
      x, (new, _) = block(x, (view, (past[0][i], past[1][i]), None), *shared)
      kept.append(new)
    return x, (tuple(zip(*kept)), ())


def forward(
  cfg: config.ModelConfig,
  params: at.Params,
  tokens: jax.Array,
  memory: memory_lib.Memory | None = None,
  *,
  positions: jax.Array | None = None,
  cache: cache_lib.Cache | None = None,
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
  views = None if memory is None else cms.per_layer_memory(memory)
  if states is None:
    states = cache_lib.broadcast_states(memory, tokens.shape[0])
  return Decoder(cfg).apply(
    {'params': params}, tokens, views, positions, cache, adapter, states
  )


def unembedding(
  cfg: config.ModelConfig, params: at.Params
) -> at.Float[jax.Array, 'V D']:
  """The matrix that turns `Output.hidden` into logits."""
  if cfg.tie_embeddings:
    return params['embed']['embedding']
  return params['unembedding']['kernel'].T


def init(cfg: config.ModelConfig, rng: at.Key) -> at.Params:
  """Fresh backbone weights."""
  tokens = jnp.zeros((1, 2), jnp.int32)
  positions = jnp.arange(2)[None]
  return Decoder(cfg).init(rng, tokens, None, positions, None)['params']


def count(params: at.Params) -> int:
  """Number of weights."""
  return sum(x.size for x in jax.tree.leaves(params))
