"""What each block of a model reads and writes, layer by layer."""

from collections.abc import Iterator
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.models import cms
from sleep_jax.models import layers as layers_lib
from sleep_jax.models import model as model_lib
from sleep_jax.models import positions as positions_lib
from sleep_jax.models.kernels import attention
from sleep_jax.models.mixers import base as mixers_base


class BlockTrace(NamedTuple):
  """One block's levels on a batch.

  before: `[B, T, D]`, the residual stream before the block.
  stream: `[B, T, D]`, the same after its mixer, before the first level.
  gates: of each level that the layer has a part in, `[B, T, S]`, or None.
  """

  before: jax.Array
  stream: jax.Array
  gates: tuple[jax.Array | None, ...]


def mixer_inputs(
  cfg: config.ModelConfig, tokens_BxT: at.Array
) -> mixers_base.MixerInputs:
  """What attention needs to know of rows that begin at the first column."""
  tokens = jnp.asarray(tokens_BxT)
  positions = positions_lib.default_positions(tokens)
  rope = layers_lib.rope_cos_sin(
    positions, cfg.resolved_head_dim, cfg.rope_theta, cfg.rope_scaling
  )
  mask = attention.mask(positions_lib.PositionMask(positions, positions))
  return mixers_base.MixerInputs(rope, mask, None, jnp.ones(tokens.shape, bool))


def blocks(
  model: model_lib.Model, tokens_BxT: at.Array
) -> Iterator[BlockTrace]:
  """The blocks of a model of attention, first to last."""
  cfg, inputs = model.cfg, mixer_inputs(model.cfg, tokens_BxT)
  params = model.weights()
  embedding = params['embed']['embedding'].astype(cfg.dtype)
  x = embedding[jnp.asarray(tokens_BxT)]
  per_layer = cms.per_layer_memory(model.required_memory())
  for i in range(cfg.layers):
    levels = cfg.levels_at(i)
    memory = tuple(
      _select(per_layer[j], cfg.layers_of(j).index(i)) for j in levels
    )
    weights = _select(params['blocks'], i)
    x, trace = _block(
      cfg, tuple(cfg.levels[j] for j in levels), weights, memory, x, inputs
    )
    yield trace


def _select(tree: Any, index: int) -> Any:
  return jax.tree.map(lambda leaf: leaf[index], tree)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _block(
  cfg: config.ModelConfig,
  levels: tuple[config.LevelConfig, ...],
  weights: at.Params,
  memory: tuple[cms.LayerMemory, ...],
  x: jax.Array,
  inputs: mixers_base.MixerInputs,
) -> tuple[jax.Array, BlockTrace]:
  """The residual stream after a block, and its trace."""
  norm = layers_lib.RMSNorm(cfg.norm_eps)
  mixer = mixers_base.of_layers(cfg)[0]
  scope = mixer.scope()
  y, _ = layers_lib.apply(
    mixer.module(cfg, None),
    weights[scope],
    layers_lib.apply(norm, weights[f'{scope}_norm'], x),
    *(inputs, None, None),
  )
  before, stream = x, x + y
  x = stream
  gates = []
  for i, (level, layer_memory) in enumerate(zip(levels, memory), 1):
    y, logits = layers_lib.apply(
      cms.Level(cfg, level),
      weights[f'level_{i}'],
      layers_lib.apply(norm, weights[f'level_{i}_norm'], x),
      layer_memory,
    )
    x = x + y
    if logits is None or layer_memory.status is None:
      gates.append(None)
    else:
      gates.append(cms.route(logits, layer_memory.status, level.top_k))
  return x, BlockTrace(before, stream, tuple(gates))
