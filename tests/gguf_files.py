"""Tiny GGUF files, written by the format's own library.

The order of q's and k's rows and the names are repeated here on purpose: they
are the reference that `sleep_jax.weights.gguf` is tested against.
"""

import functools
import json
import pathlib

import gguf
import numpy as np
import tokenizers

from tests import checkpoints

SPECIAL = ('<|endoftext|>', '<|im_start|>', '<|im_end|>')
TOOL = '<tool_call>'  # Is one token, but no special one.
TEMPLATE = (
  "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] "
  "+ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}"
  "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT = (
  "The night's rest isn't over; in 2024, 1234567 people slept 8 hours.\n\n"
  'Ça déjà vu: naïve café  –  日本語 テスト!\n\tif (x == 10) { return 42; }\r\n'
)
VOCAB = 400  # Of the models, in which some ids are unused.
_SIZES = dict(
  vocab_size=VOCAB, hidden_size=64, head_dim=16, intermediate_size=256
)
_NAMES = {
  'self_attn.q_proj': 'attn_q',
  'self_attn.k_proj': 'attn_k',
  'self_attn.v_proj': 'attn_v',
  'self_attn.o_proj': 'attn_output',
  'self_attn.q_norm': 'attn_q_norm',
  'self_attn.k_norm': 'attn_k_norm',
  'mlp.gate_proj': 'ffn_gate',
  'mlp.up_proj': 'ffn_up',
  'mlp.down_proj': 'ffn_down',
  'input_layernorm': 'attn_norm',
  'post_attention_layernorm': 'ffn_norm',
  'model.embed_tokens': 'token_embd',
  'model.norm': 'output_norm',
  'lm_head': 'output',
}


def settings(family: str, tied: bool, **changes) -> dict:
  """A config.json of rows that every quantisation can hold."""
  return checkpoints.settings(family, tied, **(_SIZES | changes))


def name_of(hf_name: str) -> str:
  """GGUF's name of a tensor."""
  module, _, kind = hf_name.rpartition('.')
  if not module.startswith('model.layers.'):
    return f'{_NAMES[module]}.{kind}'
  layer, _, part = module.removeprefix('model.layers.').partition('.')
  return f'blk.{layer}.{_NAMES[part]}.{kind}'


def quantised(w: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
  """A matrix as the file holds it, and the numbers that this stands for."""
  qtype = gguf.GGMLQuantizationType[kind]
  raw = gguf.quants.quantize(np.ascontiguousarray(w, np.float32), qtype)
  return raw, gguf.quants.dequantize(raw, qtype)


@functools.cache
def trained(digits: bool) -> tokenizers.Tokenizer:
  """A byte-level BPE, as SmolLM's if `digits` are split, else as GPT-2's."""
  pre = tokenizers.pre_tokenizers
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  steps = [pre.Digits(individual_digits=True)] if digits else []
  tokenizer.pre_tokenizer = pre.Sequence(
    [*steps, pre.ByteLevel(add_prefix_space=False)]
  )
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=380,
    special_tokens=list(SPECIAL),
    initial_alphabet=pre.ByteLevel.alphabet(),
    show_progress=False,
  )
  tokenizer.train_from_iterator([TEXT] * 3, trainer)
  tokenizer.add_tokens([TOOL])
  return tokenizer


def merges_of(tokenizer: tokenizers.Tokenizer) -> list[str]:
  """Its merges, as a file lists them."""
  merges = json.loads(tokenizer.to_str())['model']['merges']
  return [' '.join(m) if isinstance(m, list) else m for m in merges]


def tokenizer_fields(pre: str, rows: int = VOCAB) -> dict:
  """The metadata of a tokenizer with an embedding of so many rows."""
  tokenizer = trained(pre == 'smollm')
  ids = {i: t for t, i in tokenizer.get_vocab().items()}
  kinds = [1] * len(ids) + [5] * (rows - len(ids))
  for i, t in ids.items():
    kinds[i] = 3 if t in SPECIAL else 4 if t == TOOL else 1
  prefix = 'tokenizer.ggml.'
  return {
    f'{prefix}model': 'gpt2',
    f'{prefix}pre': pre,
    f'{prefix}tokens': [ids.get(i, f'[PAD{i}]') for i in range(rows)],
    f'{prefix}token_type': kinds,
    f'{prefix}merges': merges_of(tokenizer),
    f'{prefix}bos_token_id': 1,
    f'{prefix}eos_token_id': 2,
    f'{prefix}padding_token_id': 0,
    'tokenizer.chat_template': TEMPLATE,
  }


def model_fields(c: dict) -> dict:
  """The metadata of a model with config.json `c`."""
  values = {
    'block_count': c['num_hidden_layers'],
    'context_length': c['max_position_embeddings'],
    'embedding_length': c['hidden_size'],
    'feed_forward_length': c['intermediate_size'],
    'attention.head_count': c['num_attention_heads'],
    'attention.head_count_kv': c['num_key_value_heads'],
    'attention.key_length': c['head_dim'],
    'attention.layer_norm_rms_epsilon': c['rms_norm_eps'],
    'rope.freq_base': c.get('rope_theta', 10_000.0),
    'rope.dimension_count': c['head_dim'],
  }
  return {f'{c["model_type"]}.{k}': v for k, v in values.items()}


def write(
  path: pathlib.Path,
  c: dict,
  weights: dict[str, np.ndarray],
  kind: str,
  fields: dict | None = None,
  extra: dict[str, np.ndarray] | None = None,
  pre: str = 'smollm',
) -> dict[str, np.ndarray]:
  """Writes a file whose matrices are of type `kind`.

  Args:
    path: of the file.
    c: config.json.
    weights: by Hugging Face's names.
    kind: a quantisation; vectors are always float32.
    fields: metadata to add or to change; None leaves one out.
    extra: further tensors, float32.
    pre: the kind of tokenizer.

  Returns:
    The weights that the file stands for, by Hugging Face's names.
  """
  writer = gguf.GGUFWriter(path, c['model_type'])
  metadata = model_fields(c) | tokenizer_fields(pre, c['vocab_size'])
  for name, value in (metadata | (fields or {})).items():
    if name == 'general.architecture':
      writer.kv_data[0].pop(name)
      writer.add_string(name, value)
    elif value is not None:
      _add(writer, name, value)
  stored = {}
  for name, w in weights.items():
    w = np.asarray(w, np.float32)
    if c['model_type'] == 'llama' and ('q_proj' in name or 'k_proj' in name):
      order = _paired_rows(len(w), c['head_dim'])
    else:
      order = np.arange(len(w))
    raw, stored[name] = w[order], w
    if w.ndim == 2:
      raw, values = quantised(w[order], kind)
      stored[name] = values[np.argsort(order)]
    qtype = gguf.GGMLQuantizationType[kind] if w.ndim == 2 else None
    writer.add_tensor(name_of(name), raw, raw_dtype=qtype)
  for name, x in (extra or {}).items():
    writer.add_tensor(name, x)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return stored


def _paired_rows(rows: int, head_dim: int) -> np.ndarray:
  """For each row of the file, the row of a head of two halves."""
  half = head_dim // 2
  in_head = [i // 2 + half * (i % 2) for i in range(head_dim)]
  heads = range(0, rows, head_dim)
  return np.concatenate([np.add(first, in_head) for first in heads])


def _add(writer: gguf.GGUFWriter, name: str, value) -> None:
  if isinstance(value, bool):
    writer.add_bool(name, value)
  elif isinstance(value, int):
    writer.add_uint32(name, value)
  elif isinstance(value, float):
    writer.add_float32(name, value)
  elif isinstance(value, str):
    writer.add_string(name, value)
  else:
    writer.add_array(name, value)
