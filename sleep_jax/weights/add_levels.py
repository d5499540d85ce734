"""Adds levels to the weights of a plain model, as `stack` or `partition`.

Nested Learning section 7.3 stacks levels on a pretrained model and does not
state their position. `stack`: every block gains faster levels before its own
MLP, which becomes the slowest level; they are residual, with `down` = 0.
`partition`: every layer keeps its one MLP, and groups of layers are updated at
different intervals. In both cases the logits are those of the plain model, bit
for bit, until the first update.
"""

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

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
      more `cfg.levels`, of which the slowest is the level of `source_cfg`.
    rng: initializes the columns of a new level's `gate` and `up` beyond the
      width of the source's MLP.

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
  if len(old_widths) > 1 or old_widths[0] != new_widths[-1]:
    raise config.ConfigError(
      f'the base was trained with levels of hidden width {old_widths}, but '
      f'model.levels asks for {new_widths}; a plain base of one level may gain '
      'faster levels before it, and no others.'
    )
  return params | {'blocks': _add_faster_levels(cfg, params['blocks'], rng)}


def _resolved(cfg: config.ModelConfig, name: str) -> Any:
  """The value of a setting, with its default in place of 0."""
  defaults = {'kv_heads': cfg.num_kv_heads, 'head_dim': cfg.resolved_head_dim}
  return defaults.get(name, getattr(cfg, name))


def _add_faster_levels(
  cfg: config.ModelConfig, blocks: at.Params, rng: at.Key
) -> at.Params:
  """Makes the blocks' MLP the slowest of `cfg.levels`, and adds the others.

  A new level has `down` = 0, a copy of the MLP's norm, and copies of its `gate`
  and `up`, which are cut, or extended by random columns, to its own width.
  """
  blocks = dict(blocks)
  mlp, norm = blocks.pop('level_1'), blocks.pop('level_1_norm')
  slowest, dtype = len(cfg.levels), mlp['gate'].dtype
  initializer = nn.initializers.lecun_normal(batch_axis=(0,))

  def widen(key: at.Key, name: str, hidden: int) -> jax.Array:
    shape = (cfg.layers, cfg.dim, hidden)
    copied = mlp[name][..., :hidden]
    if copied.shape == shape:
      return jnp.asarray(copied)
    init = initializer(key, shape, dtype)
    return init.at[..., : copied.shape[-1]].set(copied)

  for i, level in enumerate(cfg.levels[:-1], 1):
    gate_key, up_key = jax.random.split(jax.random.fold_in(rng, i))
    blocks[f'level_{i}'] = {
      'gate': widen(gate_key, 'gate', level.hidden),
      'up': widen(up_key, 'up', level.hidden),
      'down': jnp.zeros((cfg.layers, level.hidden, cfg.dim), dtype),
    }
    blocks[f'level_{i}_norm'] = norm
  return blocks | {f'level_{slowest}': mlp, f'level_{slowest}_norm': norm}
