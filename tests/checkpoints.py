"""Tiny Hugging Face checkpoints, written and computed without that library.

Names, shapes and formulas are repeated here on purpose: they are the reference
that `sleep_jax.weights` is tested against.
"""

import copy
import json
import pathlib

import ml_dtypes
import numpy as np
import safetensors.numpy

VOCAB, DIM, LAYERS, HEADS, KV, HEAD, HIDDEN = 40, 16, 3, 4, 2, 8, 24
ROPE_SCALING = {
  'rope_type': 'llama3',
  'factor': 8.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 16,
}
FAMILIES = {
  'llama2': dict(
    model_type='llama',
    architectures=['LlamaForCausalLM'],
    num_key_value_heads=HEADS,
  ),
  'llama3_2': dict(
    model_type='llama',
    architectures=['LlamaForCausalLM'],
    rope_theta=500_000.0,
    rope_scaling=ROPE_SCALING,
  ),
  'qwen2_5': dict(model_type='qwen2', architectures=['Qwen2ForCausalLM']),
  'qwen3': dict(
    model_type='qwen3', architectures=['Qwen3ForCausalLM'], rope_theta=1e6
  ),
}


def settings(family: str, tied: bool, **changes) -> dict:
  """A config.json, copied: transformers writes into what it is given."""
  common = dict(
    vocab_size=VOCAB,
    hidden_size=DIM,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    num_key_value_heads=KV,
    head_dim=HEAD,
    intermediate_size=HIDDEN,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    tie_word_embeddings=tied,
    torch_dtype='float32',
    bos_token_id=1,
  )
  return copy.deepcopy(common | FAMILIES[family] | changes)


def tensors(c: dict, dtype=np.float32, seed: int = 0) -> dict[str, np.ndarray]:
  """Random weights of a model with config.json `c`."""
  rng = np.random.default_rng(seed)
  d, f = c['hidden_size'], c['intermediate_size']
  q = c['num_attention_heads'] * c['head_dim']
  kv = c['num_key_value_heads'] * c['head_dim']
  shapes = {
    'model.embed_tokens.weight': (c['vocab_size'], d),
    'model.norm.weight': (d,),
  }
  if not c['tie_word_embeddings']:
    shapes['lm_head.weight'] = (c['vocab_size'], d)
  for i in range(c['num_hidden_layers']):
    layer = {
      'input_layernorm.weight': (d,),
      'post_attention_layernorm.weight': (d,),
      'self_attn.q_proj.weight': (q, d),
      'self_attn.k_proj.weight': (kv, d),
      'self_attn.v_proj.weight': (kv, d),
      'self_attn.o_proj.weight': (d, q),
      'mlp.gate_proj.weight': (f, d),
      'mlp.up_proj.weight': (f, d),
      'mlp.down_proj.weight': (d, f),
    }
    if c['model_type'] == 'qwen2':
      layer |= {
        'self_attn.q_proj.bias': (q,),
        'self_attn.k_proj.bias': (kv,),
        'self_attn.v_proj.bias': (kv,),
      }
    if c['model_type'] == 'qwen3':
      layer |= {
        'self_attn.q_norm.weight': (c['head_dim'],),
        'self_attn.k_norm.weight': (c['head_dim'],),
      }
    shapes |= {f'model.layers.{i}.{k}': s for k, s in layer.items()}
  out = {}
  for name, shape in shapes.items():
    scale = 1.0 if 'embed' in name else shape[-1] ** -0.5
    mean = 1.0 if 'norm' in name else 0.0
    out[name] = (mean + scale * rng.normal(size=shape)).astype(dtype)
  return out


def write(
  folder: pathlib.Path, c: dict, weights: dict, files: int = 1
) -> pathlib.Path:
  """A checkpoint folder of one file, or of several with an index."""
  folder.mkdir(parents=True)
  (folder / 'config.json').write_text(json.dumps(c))
  (folder / 'tokenizer.json').write_text('{"of": "the source"}')
  if files == 1:
    safetensors.numpy.save_file(weights, folder / 'model.safetensors')
    return folder
  names, index = sorted(weights), {}
  for i in range(files):
    file = f'model-{i + 1:05d}-of-{files:05d}.safetensors'
    part = {n: weights[n] for n in names[i::files]}
    safetensors.numpy.save_file(part, folder / file)
    index |= dict.fromkeys(part, file)
  (folder / 'model.safetensors.index.json').write_text(
    json.dumps({'metadata': {}, 'weight_map': index})
  )
  return folder


def read(folder: pathlib.Path) -> dict[str, np.ndarray]:
  """All tensors of a checkpoint folder, but for a memory file."""
  out = {}
  for file in folder.glob('model*.safetensors'):
    out |= safetensors.numpy.load_file(file)
  return out


def same_bytes(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
  """Whether names, types, shapes and bits agree."""
  return a.keys() == b.keys() and all(
    a[k].dtype == b[k].dtype
    and a[k].shape == b[k].shape
    and a[k].tobytes() == b[k].tobytes()
    for k in a
  )


def forward(c: dict, weights: dict, tokens_BxT: np.ndarray) -> np.ndarray:
  """Logits `[B, T, V]`, in NumPy and float64, one head at a time."""
  w = {k: x.astype(np.float64) for k, x in weights.items()}
  eps, e = c['rms_norm_eps'], c['head_dim']
  heads = c['num_attention_heads']
  group = heads // c['num_key_value_heads']
  steps = tokens_BxT.shape[1]
  cos, sin = _rope_cos_sin(c, steps)

  def norm(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale

  def rope(x):
    a, b = x[..., : e // 2], x[..., e // 2 :]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

  def head(prefix, kind, x, i):
    rows = slice(i * e, (i + 1) * e)
    y = x @ w[f'{prefix}self_attn.{kind}_proj.weight'][rows].T
    if f'{prefix}self_attn.{kind}_proj.bias' in w:
      y = y + w[f'{prefix}self_attn.{kind}_proj.bias'][rows]
    if f'{prefix}self_attn.{kind}_norm.weight' in w:
      y = norm(y, w[f'{prefix}self_attn.{kind}_norm.weight'])
    return y

  x = w['model.embed_tokens.weight'][tokens_BxT]
  causal_mask = np.triu(np.full((steps, steps), -np.inf), 1)
  for layer in range(c['num_hidden_layers']):
    prefix = f'model.layers.{layer}.'
    y = norm(x, w[f'{prefix}input_layernorm.weight'])
    outputs = []
    for i in range(heads):
      q = rope(head(prefix, 'q', y, i))
      k = rope(head(prefix, 'k', y, i // group))
      v = head(prefix, 'v', y, i // group)
      score = q @ k.swapaxes(-1, -2) / np.sqrt(e) + causal_mask
      p = np.exp(score - score.max(-1, keepdims=True))
      outputs.append(p / p.sum(-1, keepdims=True) @ v)
    x = (
      x + np.concatenate(outputs, -1) @ w[f'{prefix}self_attn.o_proj.weight'].T
    )
    y = norm(x, w[f'{prefix}post_attention_layernorm.weight'])
    gate = y @ w[f'{prefix}mlp.gate_proj.weight'].T
    up = y @ w[f'{prefix}mlp.up_proj.weight'].T
    x = (
      x
      + (gate / (1 + np.exp(-gate)) * up) @ w[f'{prefix}mlp.down_proj.weight'].T
    )
  out = w.get('lm_head.weight', w['model.embed_tokens.weight'])
  return norm(x, w['model.norm.weight']) @ out.T


def _rope_cos_sin(c: dict, steps: int) -> tuple[np.ndarray, np.ndarray]:
  """Cosine and sine `[T, E / 2]`, with Llama 3.1's scaling by cases."""
  e = c['head_dim']
  freqs = []
  for i in range(e // 2):
    freq = c.get('rope_theta', 10_000.0) ** (-2 * i / e)
    if scaling := c.get('rope_scaling'):
      low, high = scaling['low_freq_factor'], scaling['high_freq_factor']
      turns = scaling['original_max_position_embeddings'] * freq / (2 * np.pi)
      if turns < low:
        freq /= scaling['factor']
      elif turns < high:
        share = (turns - low) / (high - low)
        freq = share * freq + (1 - share) * freq / scaling['factor']
    freqs.append(freq)
  angle = np.arange(steps)[:, None] * np.array(freqs)
  return np.cos(angle), np.sin(angle)


BF16 = ml_dtypes.bfloat16
