"""A random Llama in transformers and in sleep_jax, with equal weights."""

from typing import Any

import numpy as np

from sleep_jax import array_typing as at
from sleep_jax import config


def ours(
  dim: int, layers: int, heads: int, kv_heads: int, hidden: int, vocab: int,
  **changes: Any,
) -> config.ModelConfig:  # fmt: skip
  """The config of a Transformer: one level."""
  settings: dict[str, Any] = dict(
    vocab=vocab,
    dim=dim,
    layers=layers,
    heads=heads,
    kv_heads=kv_heads,
    levels=(config.LevelConfig(hidden),),
    unroll=layers,
  )
  return config.ModelConfig(**(settings | changes))


def theirs(cfg: config.ModelConfig, seed: int = 0) -> Any:
  """A randomly initialized `transformers.LlamaForCausalLM` of that shape."""
  import torch
  import transformers

  torch.manual_seed(seed)
  shape = transformers.LlamaConfig(
    vocab_size=cfg.vocab,
    hidden_size=cfg.dim,
    intermediate_size=cfg.levels[0].hidden,
    num_hidden_layers=cfg.layers,
    num_attention_heads=cfg.heads,
    num_key_value_heads=cfg.num_kv_heads,
    head_dim=cfg.resolved_head_dim,
    max_position_embeddings=cfg.max_len,
    rms_norm_eps=cfg.norm_eps,
    tie_word_embeddings=cfg.tie_embeddings,
    rope_parameters={'rope_type': 'default', 'rope_theta': cfg.rope_theta},
    initializer_range=0.06,  # Large enough that greedy decoding has no ties.
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=0,
  )
  return transformers.LlamaForCausalLM(shape).eval()


def params(cfg: config.ModelConfig, model: Any) -> at.Params:
  """The weights of `theirs`, in the structure of `transformer.init`."""
  w = {k: v.detach().numpy() for k, v in model.state_dict().items()}

  def stack(name: str, *shape: int) -> np.ndarray:
    names = (f'model.layers.{i}.{name}.weight' for i in range(cfg.layers))
    return np.stack([w[n].T.reshape(shape or w[n].shape) for n in names])

  d, e, f = cfg.dim, cfg.resolved_head_dim, cfg.levels[0].hidden
  projections = {'q': cfg.heads, 'k': cfg.num_kv_heads, 'v': cfg.num_kv_heads}
  blocks = {
    'attention': {
      k: {'kernel': stack(f'self_attn.{k}_proj', d, heads, e)}
      for k, heads in projections.items()
    }
    | {'o': {'kernel': stack('self_attn.o_proj', cfg.heads, e, d)}},
    'attention_norm': {'scale': stack('input_layernorm')},
    'level_1': {
      'gate': stack('mlp.gate_proj', d, f),
      'up': stack('mlp.up_proj', d, f),
      'down': stack('mlp.down_proj', f, d),
    },
    'level_1_norm': {'scale': stack('post_attention_layernorm')},
  }
  return {
    'embed': {'embedding': w['model.embed_tokens.weight']},
    'blocks': blocks,
    'norm': {'scale': w['model.norm.weight']},
  }
