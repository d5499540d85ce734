"""Levels and experts as further columns of a block's one MLP.

A SwiGLU MLP is a sum over columns j of `silu(x g_j) (x u_j) d_j`. A column of
an expert is `silu(x a_j) b_j` times its gate, so with g = a and d = b it is one
of these up to the gate, in whose place there is a linear function `x u`. Of
inputs that have passed a norm, some direction is nearly constant; u is what
comes nearest to the gate by least squares, on tokens that the model dreams.

A faster level of the same block (`stack`) is exact but for what the slower
level no longer sees of it: all columns read the stream before the chain.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.models import model as model_lib
from sleep_jax.weights import expert_bank
from sleep_jax.weights.export import trace

_MATRICES = ('gate', 'up', 'down')


class Columns(NamedTuple):
  """Columns of an MLP: `[D, W]`, `[D, W]` and `[W, D]`; or stacked, `[L, ...]`.

  Another layer's columns may be fewer; stacks are filled up with zeros.
  """

  gate: at.Array
  up: at.Array
  down: at.Array


def plain_model(cfg: config.ModelConfig, params: at.Params) -> model_lib.Model:
  """The plain model whose MLPs are the slowest level.

  Args:
    cfg: the model with its levels.
    params: with the fast change, see `expert_bank.with_fast_change`.
  """
  blocks, slowest = params['blocks'], f'level_{len(cfg.levels_per_block)}'
  dense = {
    key: jnp.stack(
      [jnp.asarray(blocks[slowest][key][i]) for i in range(cfg.layers)]
    )
    for key in _MATRICES
  }
  blocks = {
    'attention': blocks['attention'],
    'attention_norm': blocks['attention_norm'],
    'level_1': dense,
    'level_1_norm': blocks[f'{slowest}_norm'],
  }
  cfg = dataclasses.replace(cfg, levels=(_level(dense),), partition=())
  params = jax.tree.map(jnp.asarray, params | {'blocks': blocks})
  return model_lib.Model(cfg, params)


def with_columns(plain: model_lib.Model, added: Columns) -> model_lib.Model:
  """A plain model with further columns `[L, ...]`, in its own type."""
  blocks = plain.params['blocks']
  dense = {
    key: jnp.concatenate(
      [blocks['level_1'][key], new.astype(blocks['level_1'][key].dtype)], axis
    )
    for key, new, axis in zip(_MATRICES, added, (2, 2, 1), strict=True)
  }
  params = plain.params | {'blocks': blocks | {'level_1': dense}}
  cfg = dataclasses.replace(plain.cfg, levels=(_level(dense),))
  return model_lib.Model(cfg, params)


def _level(dense: at.Params) -> config.LevelConfig:
  return config.LevelConfig(dense['gate'].shape[2])


def fit(
  model: model_lib.Model,
  params: at.Params,
  dream: tuple[np.ndarray, np.ndarray],
  cfg: Any,
) -> Columns:
  """Columns for all that a plain block lacks, `[L, ...]`, float32.

  Args:
    model: with the memory.
    params: its weights with the fast change.
    dream: tokens `[N, T]` and a mask of the real ones, sampled from the model.
    cfg: a `MergeConfig`; its ridge is a penalty on u, as a share of the mean
      square of its inputs.
  """
  tokens, real = dream
  columns = []
  for i, block in enumerate(trace.blocks(model, tokens)):
    stream = np.asarray(block.stream, np.float64)[real]
    x = stream / np.sqrt(
      (stream**2).mean(-1, keepdims=True) + model.cfg.norm_eps
    )
    gates = [None if g is None else np.asarray(g)[real] for g in block.gates]
    faster = _faster_levels(model.cfg, params, i)
    columns.append([*faster, *_experts(model, i, x, gates, cfg.ridge)])
  width = max(sum(len(c.down) for c in layer) for layer in columns)
  width += -(model.cfg.levels[-1].hidden + width) % cfg.multiple
  return _stack(columns, model.cfg.dim, width)


def _norm_scale(
  cfg: config.ModelConfig, params: at.Params, level: int, layer: int
) -> np.ndarray:
  """The scale of the norm before a level in a layer, `[D]`."""
  name = f'level_{1 if cfg.partition else level + 1}_norm'
  return np.asarray(params['blocks'][name]['scale'][layer], np.float64)


def _rescale(
  cfg: config.ModelConfig, params: at.Params, level: int, layer: int
) -> np.ndarray:
  """Turns weights behind a level's norm into those behind the MLP's, [D, 1]."""
  own = _norm_scale(cfg, params, level, layer)
  mlp = _norm_scale(cfg, params, len(cfg.levels) - 1, layer)
  return np.divide(own, mlp, out=np.zeros_like(own), where=mlp != 0)[:, None]


def _faster_levels(
  cfg: config.ModelConfig, params: at.Params, layer: int
) -> list[Columns]:
  """The dense columns of the levels before the slowest; none if silent."""
  out = []
  for i in range(len(cfg.levels_per_block) - 1):
    weights = params['blocks'][f'level_{i + 1}']
    gate, up, down = (
      np.asarray(weights[key][layer], np.float64) for key in _MATRICES
    )
    if down.any():
      scale = _rescale(cfg, params, i, layer)
      out.append(Columns(scale * gate, scale * up, down))
  return out


def _experts(
  model: model_lib.Model,
  layer: int,
  x: np.ndarray,
  gates: Sequence[np.ndarray | None],
  ridge: float,
) -> list[Columns]:
  """The columns of the experts in use in a layer.

  Args:
    model: with the memory.
    layer: its index.
    x: `[N, D]`, the stream before the levels, normalised but not scaled.
    gates: of each level that the layer has a part in, `[N, S]`.
    ridge: see `fit`.
  """
  cfg, out = model.cfg, []
  mlp_input = x * _norm_scale(cfg, model.params, len(cfg.levels) - 1, layer)
  for level, gate in zip(cfg.levels_at(layer), gates, strict=True):
    if gate is None:
      continue
    bank, row = model.bank(level), cfg.layers_of(level).index(layer)
    scale = _rescale(cfg, model.params, level, layer)
    experts = jax.tree.map(lambda w: np.asarray(w, np.float64), bank.experts)
    for slot in expert_bank.used_slots(bank):
      matrices = experts.a[row, slot], experts.b[row, slot]
      out.append(_expert(matrices, scale, mlp_input, gate[:, slot], ridge))
  return out


def _expert(
  matrices: tuple[np.ndarray, np.ndarray],
  scale: np.ndarray,
  x: np.ndarray,
  gate: np.ndarray,
  ridge: float,
) -> Columns:
  """One expert: u of all columns is the gate's best linear predictor.

  A token counts by the square of what the expert would add to it.
  """
  a, b = scale * matrices[0], matrices[1]
  z = x @ a
  added = (z / (1 + np.exp(-z))) @ b
  weighted = x * (added**2).sum(axis=1)[:, None]
  moments = weighted.T @ x
  size = np.trace(moments) / len(moments)
  penalty = (ridge * size + np.finfo(float).tiny) * np.eye(len(moments))
  u = np.linalg.solve(moments + penalty, weighted.T @ gate)
  return Columns(a, np.repeat(u[:, None], a.shape[1], axis=1), b)


def _stack(columns: list[list[Columns]], dim: int, width: int) -> Columns:
  """All layers' columns, with zeros up to a common width."""
  gate, up = (np.zeros((len(columns), dim, width), np.float32) for _ in 'gu')
  down = np.zeros((len(columns), width, dim), np.float32)
  for i, layer in enumerate(columns):
    first = 0
    for c in layer:
      here = slice(first, first := first + len(c.down))
      gate[i, :, here], up[i, :, here], down[i, here] = c
  return Columns(gate, up, down)
