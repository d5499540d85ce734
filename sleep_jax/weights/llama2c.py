"""llama2.c `.bin` checkpoints (version 0, float32), in and out.

The file: seven int32 (dim, hidden_dim, n_layers, n_heads, n_kv_heads,
vocab_size, max_seq_len), then the float32 weights in a fixed order, then two
tables of the rotary embedding, which are not used. A negative vocab_size means
that a separate output matrix follows.

llama2.c applies RoPE to pairs of adjacent entries of a head, `apply_rope` to
the pairs of entries i and i + E/2, so the rows of q and k are permuted.
"""

import math
import pathlib
import struct
from typing import Any

import numpy as np

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.data import untrusted
from sleep_jax.runtime import files
from sleep_jax.weights import folder as folder_lib

_HEADER = struct.Struct('<7i')
_FIELDS = (
  'dim', 'hidden_dim', 'n_layers', 'n_heads', 'n_kv_heads', 'vocab_size',
  'max_seq_len',
)  # fmt: skip
_LATER_MAGIC = (
  b'24ka'  # The first bytes of versions 1 and 2 ("ak42" as an int32).
)
# Values that the format does not store.
_THETA, _EPS = 10_000.0, 1e-5


def read(path: pathlib.Path) -> tuple[config.ModelConfig, at.Params]:
  """Model and weights of a file; see `parse`."""
  untrusted.check_regular(path)
  return parse(path.read_bytes(), path.name)


def parse(content: bytes, where: str) -> tuple[config.ModelConfig, at.Params]:
  """Model and weights (NumPy, float32) of a file's content.

  Raises:
    ConfigError: naming `where`, if it is truncated, of another format, or holds
      a number that is not finite.
  """
  cfg = _config(content, where)
  shapes = _shapes(cfg)
  size = _HEADER.size + 4 * sum(math.prod(s) for s in shapes.values())
  if len(content) != size:
    raise config.ConfigError(
      f'{where} has {len(content)} bytes, but a model of its header has '
      f'{size}; it is truncated, or not a float32 checkpoint of llama2.c.'
    )
  weights = np.frombuffer(content, '<f4', offset=_HEADER.size)
  ends = np.cumsum([math.prod(s) for s in shapes.values()])
  arrays = {
    name: flat.reshape(shape)
    for (name, shape), flat in zip(shapes.items(), np.split(weights, ends[:-1]))
  }
  for name, array in arrays.items():
    folder_lib.check_finite(array, f'{where}: {name}')
  return cfg, _params(cfg, arrays)


def write(
  path: pathlib.Path, cfg: config.ModelConfig, params: at.Params
) -> None:
  """Writes a plain Transformer; the file is renamed when complete.

  Raises:
    ConfigError: naming the first setting that the format cannot express.
  """
  _check_expressible(cfg)
  hidden = cfg.levels[0].hidden
  vocab = cfg.vocab if cfg.tie_embeddings else -cfg.vocab
  header = _HEADER.pack(
      cfg.dim, hidden, cfg.layers, cfg.heads, cfg.num_kv_heads, vocab,
      cfg.max_len,
    )  # fmt: skip
  weights = _weights(cfg, params)
  with files.atomic(path) as f:
    f.write(header)
    for name, shape in _shapes(cfg).items():
      f.write(np.asarray(weights[name], '<f4').reshape(shape).tobytes())


def _config(content: bytes, where: str) -> config.ModelConfig:
  if content[:4] == _LATER_MAGIC:
    raise config.ConfigError(
      f'{where} is a llama2.c checkpoint of a later version; export it with '
      '--version 0.'
    )
  if len(content) < _HEADER.size:
    raise config.ConfigError(
      f'{where} has {len(content)} bytes, less than the header of a llama2.c '
      'checkpoint; it is truncated.'
    )
  header = dict(zip(_FIELDS, _HEADER.unpack_from(content)))
  for name, value in header.items():
    if value < 1 and not (name == 'vocab_size' and value < 0):
      raise config.ConfigError(
        f'{where}: {name}={value} in its header; it is not a llama2.c '
        'checkpoint.'
      )
  try:
    return config.ModelConfig(
      vocab=abs(header['vocab_size']),
      dim=header['dim'],
      layers=header['n_layers'],
      heads=header['n_heads'],
      kv_heads=header['n_kv_heads'],
      levels=(config.LevelConfig(hidden=header['hidden_dim']),),
      max_len=header['max_seq_len'],
      rope_theta=_THETA,
      norm_eps=_EPS,
      tie_embeddings=header['vocab_size'] > 0,
    )
  except config.ConfigError as e:
    raise config.ConfigError(
      f'{where} is not a llama2.c checkpoint: {e}'
    ) from None


def _check_expressible(cfg: config.ModelConfig) -> None:
  settings: dict[str, tuple[Any, Any]] = {
    'levels': (len(cfg.levels_per_block), 1),
    'head_dim': (cfg.resolved_head_dim, cfg.dim // cfg.heads),
    'rope_theta': (cfg.rope_theta, _THETA),
    'rope_scaling': (cfg.rope_scaling, None),
    'qkv_bias': (cfg.qkv_bias, False),
    'qk_norm': (cfg.qk_norm, False),
    'norm_eps': (cfg.norm_eps, _EPS),
  }
  for name, (value, needed) in settings.items():
    if value != needed:
      raise config.ConfigError(
        f'model.{name} is {value}, and a llama2.c checkpoint can only hold '
        f'{needed}; save the model as .npz instead.'
      )


def _shapes(cfg: config.ModelConfig) -> dict[str, tuple[int, ...]]:
  """The shape of every array, in the order of the file."""
  l, d, f = cfg.layers, cfg.dim, cfg.levels[0].hidden
  e = cfg.resolved_head_dim
  q, kv = cfg.heads * e, cfg.num_kv_heads * e
  shapes = {
    'embed': (cfg.vocab, d),
    'attention_norm': (l, d),
    'q': (l, q, d),
    'k': (l, kv, d),
    'v': (l, kv, d),
    'o': (l, d, q),
    'level_norm': (l, d),
    'gate': (l, f, d),
    'down': (l, d, f),
    'up': (l, f, d),
    'norm': (d,),
    'cos': (cfg.max_len, e // 2),
    'sin': (cfg.max_len, e // 2),
  }
  return shapes if cfg.tie_embeddings else shapes | {'head': (cfg.vocab, d)}


def _params(cfg: config.ModelConfig, w: dict[str, np.ndarray]) -> at.Params:
  e = cfg.resolved_head_dim

  def to_heads(name: str, halves: bool) -> np.ndarray:
    """`[L, heads * E, D]` -> `[L, D, heads, E]`."""
    x = w[name].reshape(cfg.layers, -1, e // 2, 2, cfg.dim)
    x = x.swapaxes(2, 3) if halves else x
    return x.reshape(cfg.layers, -1, e, cfg.dim).transpose(0, 3, 1, 2)

  def transposed(name: str) -> np.ndarray:
    return w[name].swapaxes(1, 2)

  o = transposed('o').reshape(cfg.layers, cfg.heads, e, cfg.dim)
  params = {
    'embed': {'embedding': w['embed']},
    'blocks': {
      'attention_norm': {'scale': w['attention_norm']},
      'attention': {
        'q': {'kernel': to_heads('q', True)},
        'k': {'kernel': to_heads('k', True)},
        'v': {'kernel': to_heads('v', False)},
        'o': {'kernel': o},
      },
      'level_1_norm': {'scale': w['level_norm']},
      'level_1': {name: transposed(name) for name in ('gate', 'up', 'down')},
    },
    'norm': {'scale': w['norm']},
  }
  if not cfg.tie_embeddings:
    params['head'] = {'kernel': w['head'].T}
  return params


def _weights(cfg: config.ModelConfig, params: at.Params) -> dict[str, Any]:
  """The inverse of `_params`, with the tables of the rotary embedding."""
  blocks, e = params['blocks'], cfg.resolved_head_dim
  attention = {k: np.asarray(v['kernel']) for k, v in
                 blocks['attention'].items()}  # fmt: skip

  def from_heads(name: str, halves: bool) -> np.ndarray:
    x = attention[name].transpose(0, 2, 3, 1)
    x = x.reshape(cfg.layers, -1, *((2, e // 2) if halves else (e,)), cfg.dim)
    return x.swapaxes(2, 3) if halves else x

  freq = _THETA ** (-np.arange(e // 2, dtype=np.float32) / (e // 2))
  angle = np.outer(np.arange(cfg.max_len, dtype=np.float32), freq)
  o = attention['o'].reshape(cfg.layers, -1, cfg.dim)
  w = {
    'embed': params['embed']['embedding'],
    'attention_norm': blocks['attention_norm']['scale'],
    'q': from_heads('q', True),
    'k': from_heads('k', True),
    'v': from_heads('v', False),
    'o': o.swapaxes(1, 2),
    'level_norm': blocks['level_1_norm']['scale'],
    **{k: np.asarray(v).swapaxes(1, 2) for k, v in blocks['level_1'].items()},
    'norm': params['norm']['scale'],
    'cos': np.cos(angle),
    'sin': np.sin(angle),
  }
  if not cfg.tie_embeddings:
    w['head'] = np.asarray(params['head']['kernel']).T
  return w
