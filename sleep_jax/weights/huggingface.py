"""Hugging Face safetensors <-> our stacked parameters, a tensor at a time.

Reading holds one tensor of the source in RAM beside what `allocate` returns
(files mapped into memory, for a large model); writing holds one shard.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import json
import math
import pathlib
from typing import Any

from flax import traverse_util
import ml_dtypes
import numpy as np

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.weights import folder as folder_lib

INDEX = 'model.safetensors.index.json'
SINGLE = 'model.safetensors'
SHARD_BYTES = 2 << 30
_DTYPES = {
  'F32': np.dtype('float32'),
  'F16': np.dtype('float16'),
  'BF16': np.dtype(ml_dtypes.bfloat16),
}


@dataclasses.dataclass(frozen=True)
class TensorSlot:
  """Where a tensor of theirs stands among ours.

  name: our parameter, dotted.
  layer: its index in that stack; None if it has no layer axis.
  shape: their shape.
  ours: our shape of the same, without the layer axis.
  turned: whether theirs is `[out, in]` and ours `[in, out]`.
  """

  name: str
  layer: int | None
  shape: tuple[int, ...]
  ours: tuple[int, ...]
  turned: bool


def tensor_slots(cfg: config.ModelConfig) -> dict[str, TensorSlot]:
  """Every tensor of a plain checkpoint of `cfg`, by their name.

  Of several levels in a block, the slowest is the plain checkpoint's MLP.
  """
  d, e, v = cfg.dim, cfg.resolved_head_dim, cfg.vocab
  h, k, f = cfg.heads, cfg.num_kv_heads, cfg.levels[-1].hidden
  level = f'level_{len(cfg.levels_per_block)}'
  into = {'q': (d, h, e), 'k': (d, k, e), 'v': (d, k, e)}
  rows = [
    ('input_layernorm', 'attention_norm.scale', (d,), False),
    ('post_attention_layernorm', f'{level}_norm.scale', (d,), False),
    ('self_attn.o_proj', 'attention.o.kernel', (h, e, d), True),
    ('mlp.gate_proj', f'{level}.gate', (d, f), True),
    ('mlp.up_proj', f'{level}.up', (d, f), True),
    ('mlp.down_proj', f'{level}.down', (f, d), True),
  ]
  for n, shape in into.items():
    rows.append((f'self_attn.{n}_proj', f'attention.{n}.kernel', shape, True))
  if cfg.qk_norm:
    for n in 'qk':
      rows.append(
        (f'self_attn.{n}_norm', f'attention.{n}_norm.scale', (e,), False)
      )
  out = {
    'model.embed_tokens.weight': _tensor_slot(
      'embed.embedding', None, (v, d), False
    )
  }
  for i in range(cfg.layers):
    at = f'model.layers.{i}.'
    for theirs, ours, shape, turned in rows:
      out[f'{at}{theirs}.weight'] = _tensor_slot(
        f'blocks.{ours}', i, shape, turned
      )
    for n, shape in into.items() if cfg.qkv_bias else ():
      ours = f'blocks.attention.{n}.bias'
      out[f'{at}self_attn.{n}_proj.bias'] = _tensor_slot(
        ours, i, shape[1:], False
      )
  out['model.norm.weight'] = _tensor_slot('norm.scale', None, (d,), False)
  if not cfg.tie_embeddings:
    out['lm_head.weight'] = _tensor_slot('head.kernel', None, (d, v), True)
  return out


def _tensor_slot(
  name: str, layer: int | None, ours: tuple[int, ...], turned: bool
) -> TensorSlot:
  if not turned:
    theirs = ours if name == 'embed.embedding' else (math.prod(ours),)
  elif '.o.' in name:  # Heads and their width are what goes in, not out.
    theirs = (ours[-1], math.prod(ours[:-1]))
  else:
    theirs = (math.prod(ours[1:]), ours[0])
  return TensorSlot(name, layer, theirs, ours, turned)


def _library():
  try:
    import safetensors
    import safetensors.numpy
  except ImportError as e:
    raise config.ConfigError(
      "safetensors files need the library of that name: pip install '.[hf]'."
    ) from e
  return safetensors


@contextlib.contextmanager
def opened(path: pathlib.Path) -> Iterator[Any]:
  """A safetensors file, or an error with its name."""
  library = _library()
  try:
    with library.safe_open(path, framework='np') as file:
      yield file
  except FileNotFoundError as e:
    raise config.ConfigError(f'{path} is missing.') from e
  except library.SafetensorError as e:
    raise config.ConfigError(
      f'{path} is cut off or no safetensors file ({e}); fetch it again.'
    ) from e


def shards(folder: pathlib.Path) -> list[pathlib.Path]:
  """The files that hold a checkpoint's tensors.

  Raises:
    ConfigError: if there are none, or one that the index names is missing.
  """
  if not (folder / INDEX).exists():
    if not (folder / SINGLE).exists():
      raise config.ConfigError(
        f'{folder} holds neither {SINGLE} nor {INDEX}; only safetensors '
        'checkpoints are read.'
      )
    return [folder / SINGLE]
  of_tensors = read_json(folder / INDEX).get('weight_map') or {}
  files = [folder / name for name in sorted(set(of_tensors.values()))]
  if not files:
    raise config.ConfigError(f'{folder / INDEX} names no shard (weight_map).')
  for file in files:
    if not file.exists():
      raise config.ConfigError(f'shard {file}, named by {INDEX}, is missing.')
  return files


def _checked(
  files: list[pathlib.Path], cfg: config.ModelConfig
) -> dict[str, np.dtype]:
  """Looks at every header before any tensor is read.

  Returns:
    The type of each of our parameters.
  """
  expected, found = tensor_slots(cfg), set()
  dtypes: dict[str, np.dtype] = {}
  for file in files:
    with opened(file) as f:
      for name in f.keys():
        if _surplus(name, cfg):
          continue
        if name not in expected or name in found:
          what = 'unknown' if name not in expected else 'there twice'
          raise config.ConfigError(f'{file}: tensor {name} is {what}.')
        found.add(name)
        place, header = expected[name], f.get_slice(name)
        if (shape := tuple(header.get_shape())) != place.shape:
          raise config.ConfigError(
            f'{file}: tensor {name} has shape {shape}, but config.json makes '
            f'it {place.shape}.'
          )
        dtype = config.lookup(
          header.get_dtype(), _DTYPES, f'{file}: type of tensor {name}'
        )
        if dtypes.setdefault(place.name, dtype) != dtype:
          raise config.ConfigError(
            f'{file}: tensor {name} is {dtype}, but that of another layer is '
            f'{dtypes[place.name]}.'
          )
  if missing := [name for name in expected if name not in found]:
    raise config.ConfigError(
      f'{files[0].parent}: tensor {missing[0]} is in none of its files.'
    )
  return dtypes


def _surplus(name: str, cfg: config.ModelConfig) -> bool:
  """Tensors that some checkpoints hold though the config implies them."""
  tied = name == 'lm_head.weight' and cfg.tie_embeddings
  return tied or name.endswith('.rotary_emb.inv_freq')


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """A JSON object, or an error with the file's name."""
  try:
    return json.loads(path.read_text(encoding='utf-8'))
  except (OSError, ValueError) as e:
    raise config.ConfigError(f'{path} cannot be read: {e}.') from e


def load(
  folder: pathlib.Path,
  cfg: config.ModelConfig,
  allocate: folder_lib.Allocate | None = None,
) -> at.Params:
  """The weights of a plain checkpoint, types and bits as they are.

  Args:
    folder: holds the safetensors file or files.
    cfg: the model, from `architectures.model_config`; if blocks have several
      levels, the weights of the slowest alone are returned.
    allocate: gives the arrays to fill; default: in RAM.

  Raises:
    ConfigError: naming the file or tensor that is missing, cut off, unknown,
      or of a wrong shape or type. Nothing has been allocated then, except if a
      tied checkpoint's `lm_head.weight` differs from its embedding.
  """
  files, by_name = shards(folder), tensor_slots(cfg)
  dtypes = _checked(files, cfg)
  allocate = allocate or (lambda name, shape, dtype: np.empty(shape, dtype))
  arrays: dict[str, np.ndarray] = {}
  for place in by_name.values():
    if place.name not in arrays:
      stack = () if place.layer is None else (cfg.layers,)
      arrays[place.name] = allocate(
        place.name, (*stack, *place.ours), dtypes[place.name]
      )
  for file in files:
    with opened(file) as f:
      for name in f.keys():
        if not _surplus(name, cfg):
          _put(arrays, by_name[name], f.get_tensor(name))
  _check_tie(files, cfg, arrays['embed.embedding'])
  return traverse_util.unflatten_dict(arrays, sep='.')


def _put(
  arrays: dict[str, np.ndarray], place: TensorSlot, tensor: np.ndarray
) -> None:
  ours = arrays[place.name]
  ours = ours if place.layer is None else ours[place.layer]
  if place.turned:
    tensor = tensor.T
  ours.reshape(tensor.shape)[...] = tensor  # A view: `ours` is contiguous.


def _check_tie(
  files: list[pathlib.Path], cfg: config.ModelConfig, embedding: np.ndarray
) -> None:
  for file in files if cfg.tie_embeddings else ():
    with opened(file) as f:
      if 'lm_head.weight' in f.keys() and not np.array_equal(
        f.get_tensor('lm_head.weight'), embedding
      ):
        raise config.ConfigError(
          f'{file}: config.json ties the embeddings, but tensor lm_head.weight '
          'differs from model.embed_tokens.weight.'
        )


def save(
  folder: pathlib.Path,
  cfg: config.ModelConfig,
  params: at.Params,
  shard_bytes: int = SHARD_BYTES,
) -> None:
  """Writes the tensors of a plain checkpoint; config.json is not written.

  Args:
    folder: exists; its files get their names as they are written, so it should
      be a folder that is renamed when all is done.
    cfg: the model; of several levels in a block, the slowest is written.
    params: leaves need `shape`, `dtype` and, if stacked, indexing by layer.
    shard_bytes: a file holds at most this much, or one tensor; RAM as well.
  """
  leaves = traverse_util.flatten_dict(params, sep='.')
  groups: list[dict[str, TensorSlot]] = [{}]
  held = total = 0
  for name, place in tensor_slots(cfg).items():
    size = math.prod(place.shape) * np.dtype(leaves[place.name].dtype).itemsize
    if held and held + size > shard_bytes:
      groups.append({})
      held = 0
    groups[-1][name] = place
    held, total = held + size, total + size
  weight_map = {}
  for i, group in enumerate(groups, 1):
    file = f'model-{i:05d}-of-{len(groups):05d}.safetensors'
    file = file if len(groups) > 1 else SINGLE
    write(
      folder / file,
      {name: _take(leaves, place) for name, place in group.items()},
      {'format': 'pt'},
    )
    weight_map |= dict.fromkeys(group, file)
  if len(groups) > 1:
    index = {'metadata': {'total_size': total}, 'weight_map': weight_map}
    text = json.dumps(index, indent=2)
    (folder / INDEX).write_text(text, encoding='utf-8')


def _take(leaves: dict[str, Any], place: TensorSlot) -> np.ndarray:
  ours = leaves[place.name]
  ours = np.asarray(ours if place.layer is None else ours[place.layer])
  if place.turned:
    return np.ascontiguousarray(ours.reshape(place.shape[::-1]).T)
  return np.ascontiguousarray(ours.reshape(place.shape))


def write(
  path: pathlib.Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]
) -> None:
  """One safetensors file."""
  _library().numpy.save_file(tensors, path, metadata)
