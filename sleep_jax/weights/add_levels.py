"""Adds levels to the weights of a model, as `stack` or `partition`.

Nested Learning section 7.3 stacks levels on a pretrained model and does not
state their position. `stack`: every block gains faster levels before its own
MLP, which becomes the slowest level; they are residual, with `down` = 0.
`partition`: every layer keeps its one MLP, and groups of layers are updated at
different intervals. A base that has several levels may gain slower ones after
them, which are silent in the same way: a place for experts. In all cases the
logits are those of the base, bit for bit, until the first update.
"""

from typing import Any

from flax import linen as nn
import jax
import numpy as np

from sleep_jax import array_typing as at
from sleep_jax import config

# Settings that the weights were trained with; all others may change.
_FIXED_FIELDS = (
  'vocab',
  'dim',
  'layers',
  'heads',
  'kv_heads',
  'head_dim',
  'rope_theta',
  'rope_scaling',
  'qkv_bias',
  'qk_norm',
  'norm_eps',
  'tie_embeddings',
)


def add_levels(
  source_cfg: config.ModelConfig,
  params: at.Params,
  cfg: config.ModelConfig,
  rng: at.Key,
) -> at.Params:
  """Converts weights of the model `source_cfg` to the model `cfg`.

  Args:
    source_cfg: the model that the weights were trained as.
    params: its weights.
    cfg: the same model, or that model with levels: `cfg.partition` set, or
      more `cfg.levels`, of which the slowest is the one level of `source_cfg`,
      or the fastest are its several levels.
    rng: initializes the columns of a new level's `gate` and `up` beyond the
      width of the MLP that they are copied from.

  Raises:
    ConfigError: naming the first setting that does not match.
  """
  for name in _FIXED_FIELDS:
    old, new = _resolved(source_cfg, name), _resolved(cfg, name)
    if old != new:
      raise config.ConfigError(
        f'the base was trained with {name}={old}, but model.{name}={new}; '
        "use the base's own setting or another base."
      )
  old_widths, new_widths = (
    [level.hidden for level in c.levels_per_block] for c in (source_cfg, cfg)
  )
  if old_widths == new_widths:
    return params
  blocks = dict(params['blocks'])
  if len(old_widths) == 1 and old_widths[0] == new_widths[-1]:
    slowest = len(new_widths)
    mlp, norm = blocks.pop('level_1'), blocks.pop('level_1_norm')
    blocks |= {f'level_{slowest}': mlp, f'level_{slowest}_norm': norm}
    source, added = slowest, range(1, slowest)
  elif 1 < len(old_widths) and old_widths == new_widths[: len(old_widths)]:
    source = len(old_widths)
    added = range(source + 1, len(new_widths) + 1)
  else:
    raise config.ConfigError(
      f'the base was trained with levels of hidden width {old_widths}, but '
      f'model.levels asks for {new_widths}; a base of one level may gain '
      'faster levels before it, one of several levels slower ones after them.'
    )
  for level in added:
    key = jax.random.fold_in(rng, level)
    blocks[f'level_{level}'] = _silent(
      cfg, blocks[f'level_{source}'], cfg.levels[level - 1].hidden, key
    )
    blocks[f'level_{level}_norm'] = blocks[f'level_{source}_norm']
  return params | {'blocks': blocks}


def _resolved(cfg: config.ModelConfig, name: str) -> Any:
  """The value of a setting, with its default in place of 0."""
  defaults = {'kv_heads': cfg.num_kv_heads, 'head_dim': cfg.resolved_head_dim}
  return defaults.get(name, getattr(cfg, name))


def _silent(
  cfg: config.ModelConfig, mlp: at.Params, hidden: int, rng: at.Key
) -> at.Params:
  """The MLP of a new level: its `down` is 0.

  Its `gate` and `up` are those of `mlp`, cut, or extended by random columns, to
  `hidden`.
  """
  dtype = mlp['gate'].dtype
  initializer = nn.initializers.lecun_normal(batch_axis=(0,))

  def widen(key: at.Key, name: str) -> at.Array:
    shape = (cfg.layers, cfg.dim, hidden)
    copied = mlp[name][..., :hidden]
    if copied.shape == shape:
      return copied
    init = initializer(key, shape, dtype)
    return init.at[..., : copied.shape[-1]].set(copied)

  gate_key, up_key = jax.random.split(rng)
  return {
    'gate': widen(gate_key, 'gate'),
    'up': widen(up_key, 'up'),
    'down': np.zeros((cfg.layers, hidden, cfg.dim), dtype),
  }
