"""A Llama-shaped decoder whose feed-forward part is the CMS.

Tokens are mixed by attention, or, in a hybrid (`cfg.mixers`), by attention in
some layers and by a linear recurrence in others.

The module is used as a pure function: `apply(params, tokens, memory, cache)`.
Nothing is stored inside; memory and cache go in and come out.
"""

from typing import Any, cast

from flax import linen as nn
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
from sleep_jax.models import segments
from sleep_jax.models.kernels import attention
from sleep_jax.models.mixers import base as mixers_base


class Output(at.Pytree):
  """What a forward pass returns."""

  logits: at.Float[jax.Array, 'B T V']
  hidden: at.Float[jax.Array, 'B T D']  # After the final norm.
  # Per level, logits [L, B, T, S] over the layers that the level has.
  routes: tuple[jax.Array | None, ...]
  cache: cache_lib.Cache | None
  # What the recurrent layers hold after the last token, [B, H, K, V] each.
  states: tuple[jax.Array, ...] = ()

  def router_logits(self, level: int) -> jax.Array:
    """Those of level number `level` (0 = fastest), `[L, B, T, S]`.

    Raises:
      ValueError: if that level has no slots.
    """
    logits = self.routes[level]
    if logits is None:
      raise ValueError(f'Level {level + 1} has no slots.')
    return logits

  def select(self, *index: slice) -> 'Output':
    """With the logits and hidden states at `[rows, columns]` alone."""
    return self.replace(logits=self.logits[index], hidden=self.hidden[index])


class Decoder(nn.Module):
  """Tokens in, logits out; see `forward`.

  per_layer: weights and memory are held layer by layer and only the last
    column's logits are computed, see `inference.decoding`.
  """

  cfg: config.ModelConfig
  per_layer: bool = False

  @nn.compact
  def __call__(
    self,
    tokens: jax.Array,
    memory: Any,
    positions: jax.Array,
    cache: cache_lib.Cache | None,
    adapter: lora.Adapter | None = None,
    states: tuple[jax.Array, ...] = (),
  ) -> Output:
    """`memory` is `cms.per_layer_memory` of one; the rest as in `forward`."""
    c, layer_range = self.cfg, None
    embed = nn.Embed(
      c.vocab,
      c.dim,
      dtype=jnp.dtype(c.dtype),
      name='embed',
      embedding_init=nn.initializers.normal(0.02),
    )
    if tokens.ndim == 2:
      x = embed(tokens)
    else:
      x, layer_range = tokens, range(c.frozen_layers, c.layers)
    inputs, key_positions = _mixer_inputs(c, positions, cache)
    if cache is None:
      caches = cache_lib.init_layer_caches(c, len(tokens), states)
    else:
      caches = cache.layers
    stack = segments.stack(c, self.per_layer, name='blocks')
    if self.per_layer and not c.mixers:
      nn.share_scope(self, stack)  # Its blocks are not in a tree of theirs.
    x, caches, routes = stack(
      x, block_lib.LayerInputs(memory, caches, adapter), inputs, layer_range
    )
    if self.per_layer:  # A sampler asks for the last column alone.
      x = x[:, -1:]
    hidden = layers_lib.RMSNorm(c.norm_eps, name='norm')(x)
    unembed = embed.attend
    if not c.tie_embeddings:
      unembed = nn.Dense(
        c.vocab, use_bias=False, dtype=hidden.dtype, name='head'
      )
    logits = layers_lib.by_token(unembed, hidden)
    if cache is not None:
      cache = cache_lib.Cache(
        caches, key_positions, cache.end_index + tokens.shape[1]
      )
    logits, states = logits.astype(jnp.float32), ()
    if c.mixers:
      states = cache_lib.recurrent_states(c, caches)
    return Output(logits, hidden, routes, cache, states)


def _mixer_inputs(
  cfg: config.ModelConfig,
  positions: jax.Array,
  cache: cache_lib.Cache | None,
) -> tuple[mixers_base.MixerInputs, jax.Array]:
  """What the layers share, and the positions of all columns `[B, C]`."""
  key_positions, cache_index = positions, None
  if cache is not None:
    cache_index = cache.end_index
    key_positions = jax.lax.dynamic_update_slice_in_dim(
      cache.positions, positions, cache_index, axis=1
    )
  rope = layers_lib.rope_cos_sin(
    positions, cfg.resolved_head_dim, cfg.rope_theta, cfg.rope_scaling
  )
  visible = positions_lib.PositionMask(positions, key_positions)
  mask = attention.mask(visible, cached=cache is not None)
  token_mask = positions != positions_lib.PAD_POSITION
  inputs = mixers_base.MixerInputs(rope, mask, cache_index, token_mask)
  return inputs, key_positions


def forward(
  cfg: config.ModelConfig,
  params: at.Params,
  tokens: at.Array,
  memory: memory_lib.Memory | None = None,
  *,
  positions: at.Array | None = None,
  cache: cache_lib.Cache | None = None,
  adapter: lora.Adapter | None = None,
) -> Output:
  """One forward pass.

  Args:
    cfg: the model.
    params: backbone weights, as `init` gives them.
    tokens: `[B, T]`; or `[B, T, D]`, the `frozen_prefix` of such, which is then
      not computed again.
    memory: fast weights and experts; None computes the bare backbone. Its
      recurrent states, [H, K, V] for every row or [B, H, K, V], are what a
      hybrid's recurrent layers begin with, unless a cache is given.
    positions: `[B, T]`, PAD_POSITION where a token is padding; default
      0..T-1, or continuing after the cache's columns.
    cache: keys and values of earlier columns; its space must suffice.
    adapter: low-rank changes of the backbone's matrices.

  Returns:
    The `Output`; `cache` holds the new columns if one was given.
  """
  tokens = jnp.asarray(tokens)
  if positions is None:
    first = 0 if cache is None else cache.end_index
    positions = positions_lib.default_positions(tokens, first)
  positions = jnp.asarray(positions)
  params = memory_lib.with_backbone_delta(cfg, params, memory)
  layer_memory = None if memory is None else cms.per_layer_memory(memory)
  states = cache_lib.broadcast_states(memory, tokens.shape[0])
  return layers_lib.apply(
    Decoder(cfg),
    params,
    *(tokens, layer_memory, positions, cache, adapter, states),
  )


def frozen_prefix(
  cfg: config.ModelConfig,
  params: at.Params,
  tokens: at.Array,
  memory: memory_lib.Memory,
  positions: at.Array,
) -> at.Float[jax.Array, 'B T D']:
  """What the layers that no level ever changes make of `tokens`.

  It is the same for a model before and after any change of its memory, and all
  of its backward pass lies above it.

  Args:
    cfg: a model of which `cfg.frozen_layers` is not 0.
    params: backbone weights.
    tokens: `[B, T]`.
    memory: any of this model.
    positions: `[B, T]`.
  """
  tokens = jnp.asarray(tokens)
  x = params['embed']['embedding'][tokens].astype(cfg.dtype)
  inputs, _ = _mixer_inputs(cfg, jnp.asarray(positions), None)
  layers = block_lib.LayerInputs(cms.per_layer_memory(memory), None, None)
  x, *_ = layers_lib.apply(
    layer_stack.LayerStack(cfg),
    params['blocks'],
    *(x, layers, inputs, range(cfg.frozen_layers)),
  )
  return x


def unembedding(
  cfg: config.ModelConfig, params: at.Params
) -> at.Float[jax.Array, 'V D']:
  """The matrix that turns `Output.hidden` into logits."""
  if cfg.tie_embeddings:
    return params['embed']['embedding']
  return params['head']['kernel'].T


def init(cfg: config.ModelConfig, rng: at.Key) -> at.Params:
  """Fresh backbone weights."""
  tokens = jnp.zeros((1, 2), jnp.int32)
  positions = jnp.arange(2)[None]
  variables = Decoder(cfg).init(rng, tokens, None, positions, None)
  return cast(at.Params, variables['params'])


def count(params: at.Params) -> int:
  """Number of weights."""
  return sum(x.size for x in jax.tree.leaves(params))
