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

from sleep_jax import array_typing as at
from sleep_jax import config

# What the weights were trained for; the rest of a config is free to change.
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
  had: config.ModelConfig,
  params: at.Params,
  cfg: config.ModelConfig,
  rng: at.Key,
) -> at.Params:
  """Weights of a model `had`, for the model `cfg`.

  Args:
    had: the model that the weights were trained as.
    params: its weights.
    cfg: the same model, or that model with levels: `cfg.partition` set, or
      more `cfg.levels` of which the slowest is the one that `had` has.
    rng: draws what of `gate` and `up` is wider than the MLP's own.

  Raises:
    ConfigError: naming the first setting that does not fit.
  """
  for name in _FIXED_FIELDS:
    old, new = _resolved(had, name), _resolved(cfg, name)
    if old != new:
      raise config.ConfigError(
        f'the base was trained with {name}={old}, but model.{name}={new}; '
        "use the base's own setting or another base."
      )
  trained, wanted = ([l.hidden for l in c.levels_per_block] for c in (had, cfg))
  if trained == wanted:
    return params
  if len(trained) > 1 or trained[0] != wanted[-1]:
    raise config.ConfigError(
      f'the base was trained with levels of hidden width {trained}, but '
      f'model.levels asks for {wanted}; a plain base of one level may gain '
      'faster levels before it, and no others.'
    )
  return params | {'blocks': _stacked(cfg, params['blocks'], rng)}


def _resolved(cfg: config.ModelConfig, name: str):
  """A setting's value, with 0 for `as usual` resolved."""
  usual = {'kv_heads': cfg.num_kv_heads, 'head_dim': cfg.resolved_head_dim}
  return usual.get(name, getattr(cfg, name))


def _stacked(
  cfg: config.ModelConfig, blocks: at.Params, rng: at.Key
) -> at.Params:
  """The blocks' one MLP as the slowest of `cfg.levels`, silent ones before.

  A new level begins with the norm and the features of that MLP, which it would
  else have to learn, and draws what it has beyond them.
  """
  blocks = dict(blocks)
  own, norm = blocks.pop('level_1'), blocks.pop('level_1_norm')
  slowest, dtype = len(cfg.levels), own['gate'].dtype
  draw = nn.initializers.lecun_normal(batch_axis=(0,))

  def features(key: at.Key, name: str, hidden: int) -> jax.Array:
    shape = (cfg.layers, cfg.dim, hidden)
    borrowed = own[name][..., :hidden]
    if borrowed.shape == shape:
      return jnp.asarray(borrowed)
    fresh = draw(key, shape, dtype)
    return fresh.at[..., : borrowed.shape[-1]].set(borrowed)

  for i, level in enumerate(cfg.levels[:-1], 1):
    gate, up = jax.random.split(jax.random.fold_in(rng, i))
    blocks[f'level_{i}'] = {
      'gate': features(gate, 'gate', level.hidden),
      'up': features(up, 'up', level.hidden),
      'down': jnp.zeros((cfg.layers, level.hidden, cfg.dim), dtype),
    }
    blocks[f'level_{i}_norm'] = norm
  return blocks | {f'level_{slowest}': own, f'level_{slowest}_norm': norm}
