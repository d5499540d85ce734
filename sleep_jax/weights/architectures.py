"""Hugging Face's config.json <-> ModelConfig, for the supported families.

Llama 2 and 3.x, Qwen2.5 and Qwen3. A setting that changes the computation and
is not supported raises an error; it is never ignored.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

from sleep_jax import config

_FAMILIES = {
  'llama': 'LlamaForCausalLM',
  'qwen2': 'Qwen2ForCausalLM',
  'qwen3': 'Qwen3ForCausalLM',
}
# What the settings that are read must be; one that is absent has its default.
_TYPES: dict[str, Any] = {
  'hidden_size': config.Count,
  'num_attention_heads': config.Count,
  'vocab_size': config.Count,
  'num_hidden_layers': config.Count,
  'intermediate_size': config.Count,
  'num_key_value_heads': config.Count | None,
  'head_dim': config.Count | None,
  'max_position_embeddings': config.Count,
  'rms_norm_eps': float,
  'tie_word_embeddings': bool,
  'layer_types': tuple[str, ...] | None,
}
# Settings that must have these values, or be absent.
_FIXED = {
  'hidden_act': ('silu',),
  'attention_bias': (False,),  # Would give the output projection one as well.
  'mlp_bias': (False,),
  'use_sliding_window': (False,),
  'pretraining_tp': (1,),
  'quantization_config': (None,),
}


def model_config(values: Mapping[str, Any]) -> config.ModelConfig:
  """The model that a config.json describes.

  Raises:
    ConfigError: naming the architecture or setting that is not supported.
  """
  family = str(values.get('model_type'))
  architectures = values.get('architectures')
  if architectures is None:
    architectures = [_FAMILIES.get(family)]
  if family not in _FAMILIES or architectures != [_FAMILIES[family]]:
    raise config.ConfigError(
      f'config.json: architectures={architectures} (model_type={family!r}) is '
      f'unknown; known are {", ".join(_FAMILIES.values())}.'
    )
  for name, hint in _TYPES.items():
    if name in values:
      config.check_value(hint, values[name], f'config.json: {name}')
  for name, allowed in _FIXED.items():
    if values.get(name, allowed[0]) not in allowed:
      raise config.ConfigError(
        f'config.json: {name}={values[name]!r} is not supported; only '
        f'{allowed[0]!r} is.'
      )
  if set(values.get('layer_types') or ()) - {'full_attention'}:
    raise config.ConfigError(
      'config.json: layer_types has other types than full_attention, the '
      'only one that is supported.'
    )
  dtype = values.get('dtype') or values.get('torch_dtype') or 'float32'
  if dtype not in config.DTYPES:
    raise config.ConfigError(
      f'config.json: dtype={dtype!r} is not one of {", ".join(config.DTYPES)}.'
    )
  heads, dim = _required(values, 'num_attention_heads', 'hidden_size')
  default_head_dim = 128 if family == 'qwen3' else dim // heads
  theta, scaling = _rope(values)
  vocab, layers, hidden = _required(
    values, 'vocab_size', 'num_hidden_layers', 'intermediate_size'
  )
  return config.ModelConfig(
    vocab=vocab,
    dim=dim,
    layers=layers,
    heads=heads,
    levels=(config.LevelConfig(hidden),),
    kv_heads=values.get('num_key_value_heads') or heads,
    head_dim=values.get('head_dim') or default_head_dim,
    max_len=values.get('max_position_embeddings', 2048),
    rope_theta=theta,
    rope_scaling=scaling,
    qkv_bias=family == 'qwen2',
    qk_norm=family == 'qwen3',
    norm_eps=values.get('rms_norm_eps', 1e-6),
    tie_embeddings=values.get('tie_word_embeddings', False),
    dtype=dtype,
  )


def _required(values: Mapping[str, Any], *names: str) -> list[Any]:
  for name in names:
    if name not in values:
      raise config.ConfigError(f'config.json: {name} is missing.')
  return [values[name] for name in names]


def _rope(
  values: Mapping[str, Any],
) -> tuple[float, config.RopeScaling | None]:
  """Theta and scaling; transformers 5 keeps both in `rope_parameters`."""
  rope = values.get('rope_parameters') or values.get('rope_scaling') or {}
  config.check_mapping(rope, 'config.json: rope_scaling')
  theta = rope.get('rope_theta', values.get('rope_theta', 10_000.0))
  config.check_value(config.Positive, theta, 'config.json: rope_theta')
  kind = rope.get('rope_type', rope.get('type', 'default'))
  if kind not in ('default', 'llama3') or (
    rope.get('partial_rotary_factor', 1.0) != 1.0
  ):
    raise config.ConfigError(
      f'config.json: rope_type={kind!r} with {dict(rope)} is not supported; '
      "'default' and 'llama3' are."
    )
  if kind == 'default':
    return theta, None
  names = {
    'factor': 'factor',
    'low_freq_factor': 'low_freq_factor',
    'high_freq_factor': 'high_freq_factor',
    'original_max_len': 'original_max_position_embeddings',
  }
  scaling = dict(zip(names, _required(rope, *names.values())))
  return theta, config.from_mapping(
    config.RopeScaling, scaling, 'config.json: rope_scaling'
  )


def to_hf_config(cfg: config.ModelConfig, dtype: str) -> dict[str, Any]:
  """The config.json of a model's plain backbone, for transformers 4 and 5.

  Args:
    cfg: the model; its slowest level becomes the MLP.
    dtype: the type of its tensors.

  Raises:
    ConfigError: if no supported family computes the same function.
  """
  if cfg.mixers:
    raise config.ConfigError(
      f'model.mixers={cfg.mixers}: a hybrid has no counterpart among '
      f'{", ".join(_FAMILIES.values())}; keep it as .npz or as our folder.'
    )
  if cfg.qkv_bias and cfg.qk_norm:
    raise config.ConfigError(
      'a model with qkv_bias and qk_norm has no counterpart among '
      f'{", ".join(_FAMILIES.values())}; turn one off.'
    )
  family = 'qwen2' if cfg.qkv_bias else 'qwen3' if cfg.qk_norm else 'llama'
  scaling = cfg.rope_scaling and {
    'rope_type': 'llama3',
    'factor': cfg.rope_scaling.factor,
    'low_freq_factor': cfg.rope_scaling.low_freq_factor,
    'high_freq_factor': cfg.rope_scaling.high_freq_factor,
    'original_max_position_embeddings': cfg.rope_scaling.original_max_len,
  }
  return {
    'architectures': [_FAMILIES[family]],
    'attention_bias': False,
    'head_dim': cfg.resolved_head_dim,
    'hidden_act': 'silu',
    'hidden_size': cfg.dim,
    'intermediate_size': cfg.levels[-1].hidden,
    'max_position_embeddings': cfg.max_len,
    'model_type': family,
    'num_attention_heads': cfg.heads,
    'num_hidden_layers': cfg.layers,
    'num_key_value_heads': cfg.num_kv_heads,
    'rms_norm_eps': cfg.norm_eps,
    'rope_scaling': scaling,
    'rope_theta': cfg.rope_theta,
    'tie_word_embeddings': cfg.tie_embeddings,
    'torch_dtype': dtype,
    'use_sliding_window': False,
    'vocab_size': cfg.vocab,
  }


def describes(
  values: Mapping[str, Any], cfg: config.ModelConfig, any_width: bool = False
) -> bool:
  """Whether a config.json describes the plain backbone of `cfg`.

  Args:
    values: content of the config.json of a plain checkpoint.
    cfg: the model.
    any_width: the width of the MLP may be another one.
  """
  try:
    described = dataclasses.replace(model_config(values), dtype=cfg.dtype)
  except config.ConfigError:
    return False
  mine, its = (to_hf_config(c, cfg.dtype) for c in (cfg, described))
  if any_width:
    its['intermediate_size'] = mine['intermediate_size']
  return mine == its


# A model that slept, with its own code: the family and class that it extends.
_SLEEP = 'sleep_'


def custom(values: Mapping[str, Any], levels: list[Any]) -> dict[str, Any]:
  """The config.json of a model with code of its own.

  Args:
    values: of the plain checkpoint.
    levels: see `assets/export/configuration_sleep.py`.
  """
  family = str(values['model_type'])
  base = _FAMILIES[family].removesuffix('ForCausalLM')
  return dict(values) | {
    'architectures': [f'Sleep{base}ForCausalLM'],
    'auto_map': {
      'AutoConfig': f'configuration_sleep.Sleep{base}Config',
      'AutoModelForCausalLM': f'modeling_sleep.Sleep{base}ForCausalLM',
    },
    'model_type': f'{_SLEEP}{family}',
    'sleep_levels': levels,
  }


def is_custom(values: Mapping[str, Any]) -> bool:
  """Whether a config.json was made by `custom`."""
  return str(values.get('model_type')).removeprefix(_SLEEP) in _FAMILIES and (
    'sleep_levels' in values
  )


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
  """The config.json of the plain checkpoint that `custom` was made of."""
  out = dict(values)
  if is_custom(values):
    family = str(values['model_type']).removeprefix(_SLEEP)
    out |= {'model_type': family, 'architectures': [_FAMILIES[family]]}
    del out['sleep_levels']
    out.pop('auto_map', None)
  return out
