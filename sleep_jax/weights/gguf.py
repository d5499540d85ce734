"""GGUF files (llama.cpp): the model, its weights and its tokenizer.

Quantised tensors are read as float32, others keep their type, except that
tensors of one of our stacks that differ in type become float32. Tensors are
read one at a time: besides the arrays of `allocate`, RAM holds the metadata and
two times the largest tensor.

Llama's q and k are stored for a rotation of adjacent entries of a head; ours,
as Hugging Face's, rotates halves, so their rows are put back in that order.
Files of the other architectures keep Hugging Face's order.
"""

from collections.abc import Mapping
import dataclasses
import functools
import importlib
import pathlib
from typing import Any

from flax import traverse_util
import ml_dtypes
import numpy as np

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.data import untrusted
from sleep_jax.models import layers
from sleep_jax.weights import architectures
from sleep_jax.weights import folder as folder_lib
from sleep_jax.weights import huggingface

MAGIC = b'GGUF'
_MAX_READS = 5_000_000  # Of header fields; a vocabulary of 260,000 needs half.
_FAMILIES = ('llama', 'qwen2', 'qwen3')
_QUANTISED = (
  'Q4_0', 'Q4_1', 'Q5_0', 'Q5_1', 'Q8_0', 'Q2_K', 'Q3_K', 'Q4_K', 'Q5_K',
  'Q6_K',
)  # fmt: skip
_DTYPES = {
  'F32': np.dtype('float32'),
  'F16': np.dtype('float16'),
  'BF16': np.dtype(ml_dtypes.bfloat16),
} | dict.fromkeys(_QUANTISED, np.dtype('float32'))
# Their name of a tensor -> Hugging Face's.
_EMBEDDING = 'token_embd.weight'
_GLOBAL = {
  _EMBEDDING: 'model.embed_tokens.weight',
  'output_norm.weight': 'model.norm.weight',
  'output.weight': 'lm_head.weight',
}
_OF_LAYER = {
  'attn_norm': 'input_layernorm',
  'ffn_norm': 'post_attention_layernorm',
  'attn_q': 'self_attn.q_proj',
  'attn_k': 'self_attn.k_proj',
  'attn_v': 'self_attn.v_proj',
  'attn_output': 'self_attn.o_proj',
  'attn_q_norm': 'self_attn.q_norm',
  'attn_k_norm': 'self_attn.k_norm',
  'ffn_gate': 'mlp.gate_proj',
  'ffn_up': 'mlp.up_proj',
  'ffn_down': 'mlp.down_proj',
}
_ROPE_FACTORS = 'rope_freqs.weight'  # Llama 3's scaling, as a table.
_REQUIRED = (
  'context_length', 'embedding_length', 'block_count', 'feed_forward_length',
  'attention.head_count', 'attention.layer_norm_rms_epsilon',
)  # fmt: skip
# Settings of an architecture that are read, or change nothing, and their types.
_SETTINGS = dict.fromkeys(
  (
    *_REQUIRED, 'vocab_size', 'attention.head_count_kv', 'attention.key_length',
    'attention.value_length', 'rope.dimension_count',
    'rope.scaling.original_context_length',
  ),
  config.Count,
) | {
  'attention.layer_norm_rms_epsilon': float,
  'rope.freq_base': config.Positive,
  'rope.scaling.finetuned': bool,
}  # fmt: skip
# Settings that must have these values, or be absent.
_FIXED = {
  'attention.causal': True,
  'expert_count': 0,
  'expert_used_count': 0,
  'rope.scaling.type': 'none',
  'rope.scaling.factor': 1.0,
  'rope.scale_linear': 1.0,
  'tensor_data_layout': 'Meta AI original pth',
  'use_parallel_residual': False,
}


@dataclasses.dataclass(frozen=True)
class File:
  """An opened GGUF file; tensors are mapped into memory."""

  path: pathlib.Path
  fields: Mapping[str, Any]  # Metadata; read by `get`.
  tensors: Mapping[str, Any]  # Of the library: name, shape, type, data.

  def get(self, name: str, default: Any = None) -> Any:
    """A value of the metadata."""
    field = self.fields.get(name)
    try:
      return default if field is None else field.contents()
    except ValueError as e:  # Not UTF-8.
      raise config.ConfigError(
        f'{self.path}: {name} is damaged: {e}.'
      ) from None

  @functools.cached_property
  def model(self) -> config.ModelConfig:
    """The model, see `model_config`."""
    return model_config(self)


def _library() -> Any:
  try:
    return importlib.import_module('gguf')
  except ImportError:
    raise config.ConfigError(
      "GGUF files need the library 'gguf': pip install 'sleep_jax[hf]'."
    ) from None


def opened(path: pathlib.Path) -> File:
  """Reads the header of a file.

  Raises:
    ConfigError: if it is not a GGUF file, is truncated, or only a part of a
      model.
  """
  library = _library()
  try:
    with path.open('rb') as f:
      magic = f.read(len(MAGIC))
  except OSError as e:
    raise config.ConfigError(f'{path} cannot be read: {e.strerror}.') from None
  if magic != MAGIC:
    raise config.ConfigError(
      f'{path} is not a GGUF file; it begins with {magic!r}.'
    )
  try:
    reader = _reader(library, path)
  except Exception as e:  # Of a header that is damaged: many types.
    raise config.ConfigError(
      f'{path} is truncated, damaged or of an unknown version of GGUF '
      f'({untrusted.reason(e)}); download it again.'
    ) from None
  file = File(path, reader.fields, {t.name: t for t in reader.tensors})
  if (parts := file.get('split.count', 1)) not in (0, 1):
    raise config.ConfigError(
      f"{path} is one of {parts} parts of a model; merge them with llama.cpp's "
      'gguf-split --merge.'
    )
  return file


def _reader(library: Any, path: pathlib.Path) -> Any:
  """The library's reader, which stops where the file ends."""

  class Reader(library.GGUFReader):
    """By itself it goes on for as long as the lengths in the file say."""

    reads = 0

    def _get(self, offset, dtype, count=1, override_order=None):
      self.reads += 1
      out = super()._get(offset, dtype, count, override_order)
      if len(out) < count or self.reads > _MAX_READS:
        raise ValueError('a length in its header is beyond its end')
      return out

  return Reader(path)


def model_config(file: File) -> config.ModelConfig:
  """The model of a file.

  Raises:
    ConfigError: naming the architecture or setting that is not supported.
  """
  family = config.lookup(
    str(file.get('general.architecture')),
    {name: name for name in _FAMILIES},
    f'{file.path}: architecture',
  )
  prefix = f'{family}.'
  settings = {
    name.removeprefix(prefix): file.get(name)
    for name in file.fields
    if name.startswith(prefix)
  }
  for name, value in settings.items():
    if isinstance(value, list) or (
      name not in _SETTINGS and value != _FIXED.get(name, object())
    ):
      raise config.ConfigError(
        f'{file.path}: {prefix}{name}={value!r} is not supported.'
      )
    if name in _SETTINGS:
      hint, where = _SETTINGS[name], f'{file.path}: {prefix}{name}'
      config.check_value(hint, value, where)
  for name in (n for n in _REQUIRED if not settings.get(n)):
    raise config.ConfigError(f'{file.path}: {prefix}{name} is missing.')
  if (
    len(file.tensors[_EMBEDDING].shape if _EMBEDDING in file.tensors else ())
    != 2
  ):
    raise config.ConfigError(f'{file.path} has no matrix {_EMBEDDING}.')
  try:
    return architectures.model_config(_hf_values(file, family, settings))
  except config.ConfigError as e:
    raise config.ConfigError(f'{file.path}: {e}') from None


def _hf_values(
  file: File, family: str, settings: Mapping[str, Any]
) -> dict[str, Any]:
  """The settings under Hugging Face's names."""
  heads, dim = settings['attention.head_count'], settings['embedding_length']
  head_dim = settings.get('attention.key_length', dim // heads)
  theta = _short(settings.get('rope.freq_base', 10_000.0))
  for name in ('attention.value_length', 'rope.dimension_count'):
    if settings.get(name, head_dim) != head_dim:
      raise config.ConfigError(
        f'{name}={settings[name]} differs from the width of a head, {head_dim}.'
      )
  return {
    'model_type': family,
    'vocab_size': int(file.tensors[_EMBEDDING].shape[1]),
    'hidden_size': dim,
    'num_hidden_layers': settings['block_count'],
    'intermediate_size': settings['feed_forward_length'],
    'num_attention_heads': heads,
    'num_key_value_heads': settings.get('attention.head_count_kv', heads),
    'head_dim': head_dim,
    'max_position_embeddings': settings['context_length'],
    'rope_theta': theta,
    'rope_scaling': _rope_scaling(file, head_dim, theta),
    'rms_norm_eps': _short(settings['attention.layer_norm_rms_epsilon']),
    'tie_word_embeddings': 'output.weight' not in file.tensors,
    'dtype': _compute_dtype(file),
  }


def _short(x: float) -> float:
  """The shortest decimal number that is `x` in float32, as files store it."""
  return float(str(np.float32(x)))


def _compute_dtype(file: File) -> str:
  """bfloat16 if all matrices are; float16 would overflow in some models."""
  types = {
    t.tensor_type.name for t in file.tensors.values() if len(t.shape) > 1
  }
  return 'bfloat16' if types == {'BF16'} else 'float32'


def _rope_scaling(
  file: File, head_dim: int, theta: float
) -> dict[str, Any] | None:
  """Llama 3's scaling from its table of divisors, `[head_dim / 2]`.

  The file does not hold the settings that the table was computed with; all
  public Llamas share them but for the factor, which is the largest divisor.
  """
  if _ROPE_FACTORS not in file.tensors:
    return None
  table = np.asarray(file.tensors[_ROPE_FACTORS].data, np.float32)
  folder_lib.check_finite(table, f'tensor {_ROPE_FACTORS}')
  if table.shape != (head_dim // 2,):
    raise config.ConfigError(
      f'tensor {_ROPE_FACTORS} has shape {table.shape}; a head has '
      f'{head_dim // 2} frequencies.'
    )
  scaling = config.RopeScaling(round(float(table.max()), 3), 1.0, 4.0, 8192)
  plain, scaled = (
    np.asarray(layers.rope_frequencies(head_dim // 2, theta, s))
    for s in (None, scaling)
  )
  if not np.allclose(table, plain / scaled, rtol=1e-3):
    raise config.ConfigError(
      f'tensor {_ROPE_FACTORS} is not the table of a Llama 3 (low_freq_factor '
      '1, high_freq_factor 4, 8192 tokens), the only one that is supported.'
    )
  return {
    'rope_type': 'llama3',
    'factor': scaling.factor,
    'low_freq_factor': scaling.low_freq_factor,
    'high_freq_factor': scaling.high_freq_factor,
    'original_max_position_embeddings': scaling.original_max_len,
  }


def load(file: File, allocate: folder_lib.Allocate | None = None) -> at.Params:
  """The weights of a file.

  Args:
    file: from `opened`.
    allocate: returns the arrays to fill; default: in RAM.

  Raises:
    ConfigError: naming the tensor that is missing, unknown, or of a wrong shape
      or type; nothing has been allocated then. Or one that is not finite.
  """
  cfg = file.model
  if cfg.layers > len(file.tensors):
    raise config.ConfigError(
      f'{file.path}: block_count={cfg.layers}, but there are '
      f'{len(file.tensors)} tensors.'
    )
  slots = huggingface.tensor_slots(cfg)
  names = _hf_names(file)
  dtypes = _check_tensors(file, names, slots)
  arrays = huggingface.allocated(slots, cfg.layers, dtypes, allocate)
  permuted = file.get('general.architecture') == 'llama'
  for name, hf_name in names.items():
    tensor = _values(file.tensors[name])
    folder_lib.check_finite(tensor, f'{file.path}: tensor {name}')
    if permuted and name.endswith(('attn_q.weight', 'attn_k.weight')):
      tensor = _to_halves(tensor, cfg.resolved_head_dim)
    huggingface.copy_into(arrays, slots[hf_name], tensor)
  return traverse_util.unflatten_dict(arrays, sep='.')


def _hf_names(file: File) -> dict[str, str]:
  """Hugging Face's name of each tensor of the model."""
  names = {}
  for name in file.tensors:
    block, _, rest = name.partition('.')
    layer, _, rest = rest.partition('.')
    part, _, kind = rest.rpartition('.')
    if name in _GLOBAL:
      names[name] = _GLOBAL[name]
    elif block == 'blk' and part in _OF_LAYER:
      names[name] = f'model.layers.{layer}.{_OF_LAYER[part]}.{kind}'
    elif name != _ROPE_FACTORS:
      raise config.ConfigError(f'{file.path}: tensor {name} is unknown.')
  return names


def _check_tensors(
  file: File,
  names: Mapping[str, str],
  slots: Mapping[str, huggingface.TensorSlot],
) -> dict[str, np.dtype]:
  """The type of each of our parameters."""
  dtypes: dict[str, np.dtype] = {}
  for name, hf_name in names.items():
    tensor, slot = file.tensors[name], slots.get(hf_name)
    if slot is None:
      raise config.ConfigError(f'{file.path}: tensor {name} is unknown.')
    if (shape := tuple(tensor.shape.tolist()[::-1])) != slot.hf_shape:
      raise config.ConfigError(
        f'{file.path}: tensor {name} has shape {shape}, but the settings make '
        f'it {slot.hf_shape}.'
      )
    dtype = config.lookup(
      tensor.tensor_type.name, _DTYPES, f'{file.path}: type of tensor {name}'
    )
    if dtypes.setdefault(slot.name, dtype) != dtype:
      dtypes[slot.name] = np.dtype('float32')
  if missing := sorted(set(slots) - set(names.values())):
    raise config.ConfigError(
      f'{file.path} lacks a tensor: there is no {missing[0]}.'
    )
  return dtypes


def _values(tensor: Any) -> np.ndarray:
  """A tensor in its own type, or float32 if it is quantised."""
  kind = tensor.tensor_type.name
  if kind in _QUANTISED:
    return _library().dequantize(tensor.data, tensor.tensor_type)
  return tensor.data.view(_DTYPES[kind])


def _to_halves(rows: np.ndarray, head_dim: int) -> np.ndarray:
  """Rows `[heads * E, D]` of adjacent pairs, as rows of two halves."""
  pairs = rows.reshape(-1, head_dim // 2, 2, rows.shape[-1])
  return pairs.swapaxes(1, 2).reshape(rows.shape)
