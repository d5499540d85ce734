"""A plain backbone becomes a model with levels, in either reading.

Nested Learning section 7.3 stacks levels on a pretrained model without saying
where they stand. `stack`: every block gains faster levels before its own MLP,
which becomes the slowest of the chain; they are residual and their `down` is
zero. `partition`: every layer keeps its MLP alone, and groups of layers stand
at different clocks. Either way the logits are the plain model's, bit for bit,
until the first update.
"""

from flax import linen as nn
import jax
import jax.numpy as jnp

from sleep_jax import config
from sleep_jax import typing as t

# What the weights were trained for; the rest of a config is free to change.
_TRAINED = (
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


def adopt(
  had: config.ModelConfig,
  params: t.Params,
  cfg: config.ModelConfig,
  rng: t.Key,
) -> t.Params:
  """Weights of a model `had`, for the model `cfg`.

  Args:
    had: the model that the weights were trained as.
    params: its weights.
    cfg: the same model, or that model with levels: `cfg.partition` set, or
      more `cfg.levels` of which the slowest is the one that `had` has.
    rng: draws `gate` and `up` of new levels.

  Raises:
    ConfigError: naming the first setting that does not fit.
  """
  for name in _TRAINED:
    old, new = _meant(had, name), _meant(cfg, name)
    if old != new:
      raise config.ConfigError(
        f'the base was trained with {name}={old}, but model.{name}={new}; '
        "use the base's own setting or another base."
      )
  trained, wanted = ([l.hidden for l in c.chain] for c in (had, cfg))
  if trained == wanted:
    return params
  if len(trained) > 1 or trained[0] != wanted[-1]:
    raise config.ConfigError(
      f'the base was trained with levels of hidden width {trained}, but '
      f'model.levels asks for {wanted}; a plain base of one level may gain '
      'faster levels before it, and no others.'
    )
  return params | {'blocks': _stacked(cfg, params['blocks'], rng)}


def _meant(cfg: config.ModelConfig, name: str):
  """A setting's value, with 0 for `as usual` resolved."""
  usual = {'kv_heads': cfg.num_kv_heads, 'head_dim': cfg.size_of_head}
  return usual.get(name, getattr(cfg, name))


def _stacked(cfg: config.ModelConfig, blocks: t.Params, rng: t.Key) -> t.Params:
  """The blocks' one MLP as the slowest of `cfg.levels`, silent ones before."""
  blocks = dict(blocks)
  slowest = len(cfg.levels)
  for name in ('level_{}', 'level_{}_norm'):
    blocks[name.format(slowest)] = blocks.pop(name.format(1))
  dtype = blocks[f'level_{slowest}']['gate'].dtype
  draw = nn.initializers.lecun_normal(batch_axis=(0,))
  for i, level in enumerate(cfg.levels[:-1], 1):
    into = (cfg.layers, cfg.dim, level.hidden)
    gate, up = jax.random.split(jax.random.fold_in(rng, i))
    blocks[f'level_{i}'] = {
      'gate': draw(gate, into, dtype),
      'up': draw(up, into, dtype),
      'down': jnp.zeros((cfg.layers, level.hidden, cfg.dim), dtype),
    }
    scale = blocks[f'level_{slowest}_norm']['scale']
    blocks[f'level_{i}_norm'] = {'scale': jnp.ones(scale.shape, scale.dtype)}
  return blocks
