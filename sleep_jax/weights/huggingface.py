"""Hugging Face safetensors <-> stacked parameters, one tensor at a time.

Reading holds one tensor of the source in RAM besides the arrays of `allocate`
(memory-mapped files for a large model); writing holds one shard.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
import contextlib
import dataclasses
import json
import math
import pathlib
from typing import Any, NamedTuple

from flax import traverse_util
import ml_dtypes
import numpy as np

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.data import untrusted
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
  """The position of a Hugging Face tensor in our parameters.

  Attributes:
    name: dotted name of our parameter.
    layer: index in its layer axis; None if it has none.
    hf_shape: shape of the Hugging Face tensor.
    shape: shape in our parameter, without the layer axis.
    transposed: whether theirs is `[out, in]` and ours `[in, out]`.
  """

  name: str
  layer: int | None
  hf_shape: tuple[int, ...]
  shape: tuple[int, ...]
  transposed: bool


@dataclasses.dataclass(frozen=True)
class Layout:
  """How a folder's tensors are read as parameters.

  Attributes:
    slots: by name in the folder; see `tensor_slots`.
    ignored: further names that the folder may have.
    replaced: tensors to take in place of the folder's, by the same names.
  """

  slots: Mapping[str, TensorSlot]
  ignored: Collection[str] = ()
  replaced: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


class LazyTensor(NamedTuple):
  """A tensor to write, and what it will take; it is made when it is written."""

  nbytes: int
  make: Callable[[], np.ndarray]


def tensor_slots(cfg: config.ModelConfig) -> dict[str, TensorSlot]:
  """Every tensor of a plain checkpoint of `cfg`, by its Hugging Face name.

  Of several levels in a block, the slowest is the plain checkpoint's MLP.
  """
  d, e, v = cfg.dim, cfg.resolved_head_dim, cfg.vocab
  h, k, f = cfg.heads, cfg.num_kv_heads, cfg.levels[-1].hidden
  level = f'level_{len(cfg.levels_per_block)}'
  projections = {'q': (d, h, e), 'k': (d, k, e), 'v': (d, k, e)}
  rows = [
    ('input_layernorm', 'attention_norm.scale', (d,), False),
    ('post_attention_layernorm', f'{level}_norm.scale', (d,), False),
    ('self_attn.o_proj', 'attention.o.kernel', (h, e, d), True),
    ('mlp.gate_proj', f'{level}.gate', (d, f), True),
    ('mlp.up_proj', f'{level}.up', (d, f), True),
    ('mlp.down_proj', f'{level}.down', (f, d), True),
  ]
  for n, shape in projections.items():
    rows.append((f'self_attn.{n}_proj', f'attention.{n}.kernel', shape, True))
  if cfg.qk_norm:
    for n in 'qk':
      rows.append(
        (f'self_attn.{n}_norm', f'attention.{n}_norm.scale', (e,), False)
      )
  out = {
    'model.embed_tokens.weight': tensor_slot(
      'embed.embedding', None, (v, d), False
    )
  }
  for i in range(cfg.layers):
    prefix = f'model.layers.{i}.'
    for hf_name, name, shape, transposed in rows:
      out[f'{prefix}{hf_name}.weight'] = tensor_slot(
        f'blocks.{name}', i, shape, transposed
      )
    for n, shape in projections.items() if cfg.qkv_bias else ():
      name = f'blocks.attention.{n}.bias'
      out[f'{prefix}self_attn.{n}_proj.bias'] = tensor_slot(
        name, i, shape[1:], False
      )
  out['model.norm.weight'] = tensor_slot('norm.scale', None, (d,), False)
  if not cfg.tie_embeddings:
    out['lm_head.weight'] = tensor_slot('head.kernel', None, (d, v), True)
  return out


def tensor_slot(
  name: str, layer: int | None, shape: tuple[int, ...], transposed: bool
) -> TensorSlot:
  """The slot of our parameter `name`, of this shape without layer axis."""
  if not transposed:
    hf_shape = shape if name == 'embed.embedding' else (math.prod(shape),)
  elif '.o.' in name:  # The heads are input dimensions of this projection.
    hf_shape = (shape[-1], math.prod(shape[:-1]))
  else:
    hf_shape = (math.prod(shape[1:]), shape[0])
  return TensorSlot(name, layer, hf_shape, shape, transposed)


def _library() -> Any:
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
  """Opens a safetensors file.

  Raises:
    ConfigError: naming the file, if it is missing or truncated.
  """
  library = _library()
  try:
    file = library.safe_open(path, framework='np')
  except FileNotFoundError as e:
    raise config.ConfigError(f'{path} is missing.') from e
  except (OSError, library.SafetensorError) as e:
    raise config.ConfigError(
      f'{path} is truncated or not a safetensors file ({e}); download it again.'
    ) from e
  with file:
    yield file


def shards(folder: pathlib.Path) -> list[pathlib.Path]:
  """The files of a checkpoint's tensors.

  Raises:
    ConfigError: if there are none, or a file that the index names is missing,
      or is not in the folder.
  """
  if not (folder / INDEX).exists():
    if not (file := untrusted.member(folder, SINGLE)).is_file():
      raise config.ConfigError(
        f'{folder} holds neither {SINGLE} nor {INDEX}; only safetensors '
        'checkpoints are read.'
      )
    return [file]
  of_tensors: Any = untrusted.read_json(folder / INDEX).get('weight_map')
  config.check_mapping(of_tensors, f'{folder / INDEX}: weight_map')
  files = {untrusted.member(folder, name) for name in of_tensors.values()}
  if not files:
    raise config.ConfigError(f'{folder / INDEX} names no shard (weight_map).')
  for file in files:
    if not file.is_file():
      raise config.ConfigError(f'shard {file}, named by {INDEX}, is missing.')
  return sorted(files)


def check_depth(folder: pathlib.Path, cfg: config.ModelConfig) -> None:
  """Refuses more layers than there are tensors, before work for each of them.

  Raises:
    ConfigError: see above.
  """
  tensors = 0
  for file in shards(folder):
    with opened(file) as f:
      tensors += len(f.keys())
  if cfg.layers > tensors:
    raise config.ConfigError(
      f'{folder}: config.json has num_hidden_layers={cfg.layers}, but there '
      f'are {tensors} tensors.'
    )


def _check_headers(
  files: list[pathlib.Path], cfg: config.ModelConfig, layout: Layout
) -> dict[str, np.dtype]:
  """Checks the headers of all files before any tensor is read.

  Returns:
    The type of each of our parameters.
  """
  expected, names = layout.slots, set()
  dtypes: dict[str, np.dtype] = {}
  for file in files:
    with opened(file) as f:
      for name in f.keys():
        if _is_redundant(name, cfg) or name in layout.ignored:
          continue
        if name not in expected or name in names:
          what = 'unknown' if name not in expected else 'there twice'
          raise config.ConfigError(f'{file}: tensor {name} is {what}.')
        names.add(name)
        slot, header = expected[name], f.get_slice(name)
        if (shape := tuple(header.get_shape())) != slot.hf_shape:
          raise config.ConfigError(
            f'{file}: tensor {name} has shape {shape}, but config.json makes '
            f'it {slot.hf_shape}.'
          )
        dtype = config.lookup(
          header.get_dtype(), _DTYPES, f'{file}: type of tensor {name}'
        )
        if name in layout.replaced:
          dtype = layout.replaced[name].dtype
          folder_lib.check(
            layout.replaced[name], shape, dtype, f'{file.parent}: base.{name}'
          )
        if dtypes.setdefault(slot.name, dtype) != dtype:
          raise config.ConfigError(
            f'{file}: tensor {name} is {dtype}, but that of another layer is '
            f'{dtypes[slot.name]}.'
          )
  if missing := [name for name in expected if name not in names]:
    raise config.ConfigError(
      f'{files[0].parent}: tensor {missing[0]} is in none of its files.'
    )
  return dtypes


def _is_redundant(name: str, cfg: config.ModelConfig) -> bool:
  """Whether the tensor follows from the config; some checkpoints hold it."""
  tied = name == 'lm_head.weight' and cfg.tie_embeddings
  return tied or name.endswith('.rotary_emb.inv_freq')


def load(
  folder: pathlib.Path,
  cfg: config.ModelConfig,
  allocate: folder_lib.Allocate | None = None,
  layout: Layout | None = None,
) -> at.Params:
  """The weights of a checkpoint; types and bits are unchanged.

  Args:
    folder: holds the safetensors file or files.
    cfg: the model, from `architectures.model_config`.
    allocate: returns the arrays to fill; default: in RAM.
    layout: what the tensors are called; default: as in a plain checkpoint, so
      that of blocks of several levels only the slowest's weights are returned.

  Raises:
    ConfigError: naming the file or tensor that is missing, truncated, unknown,
      or of a wrong shape or type. Nothing has been allocated then, except if a
      number is not finite, or a tied checkpoint's `lm_head.weight` differs from
      its embedding.
  """
  check_depth(folder, cfg)
  layout = layout or Layout(tensor_slots(cfg))
  files, slots = shards(folder), layout.slots
  dtypes = _check_headers(files, cfg, layout)
  arrays = allocated(slots, cfg.layers, dtypes, allocate)
  for file in files:
    with opened(file) as f:
      for name in f.keys():
        if _is_redundant(name, cfg) or name in layout.ignored:
          continue
        tensor = layout.replaced.get(name)
        tensor = f.get_tensor(name) if tensor is None else tensor
        folder_lib.check_finite(tensor, f'{file}: tensor {name}')
        copy_into(arrays, slots[name], tensor)
  _check_tie(files, cfg, arrays['embed.embedding'])
  return traverse_util.unflatten_dict(arrays, sep='.')


def allocated(
  slots: Mapping[str, TensorSlot],
  layers: int,
  dtypes: dict[str, np.dtype],
  allocate: folder_lib.Allocate | None,
) -> dict[str, np.ndarray]:
  """An array to fill for each of our parameters, stacked over the layers.

  Args:
    slots: every tensor of the checkpoint.
    layers: L.
    dtypes: the type of each parameter.
    allocate: returns the arrays; default: in RAM.
  """
  allocate = allocate or (lambda name, shape, dtype: np.empty(shape, dtype))
  arrays: dict[str, np.ndarray] = {}
  for slot in slots.values():
    if slot.name not in arrays:
      stack = () if slot.layer is None else (layers,)
      shape = (*stack, *slot.shape)
      arrays[slot.name] = allocate(slot.name, shape, dtypes[slot.name])
  return arrays


def copy_into(
  arrays: dict[str, np.ndarray], slot: TensorSlot, tensor: np.ndarray
) -> None:
  target = arrays[slot.name]
  target = target if slot.layer is None else target[slot.layer]
  if slot.transposed:
    tensor = tensor.T
  target.reshape(tensor.shape)[...] = tensor  # A view: it is contiguous.


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


def lazy_tensors(
  params: at.Params, slots: Mapping[str, TensorSlot]
) -> dict[str, LazyTensor]:
  """The tensors of a checkpoint, by name.

  Args:
    params: leaves need `shape`, `dtype` and, if stacked, indexing by layer.
    slots: where each tensor is in them; see `tensor_slots`.
  """
  leaves: dict[str, Any] = dict(traverse_util.flatten_dict(params, sep='.'))

  def lazy(slot: TensorSlot) -> LazyTensor:
    itemsize = np.dtype(leaves[slot.name].dtype).itemsize
    return LazyTensor(
      math.prod(slot.hf_shape) * itemsize, lambda: _extract(leaves, slot)
    )

  return {name: lazy(slot) for name, slot in slots.items()}


def save(
  folder: pathlib.Path,
  tensors: Mapping[str, LazyTensor],
  shard_bytes: int = SHARD_BYTES,
) -> None:
  """Writes the tensors of a checkpoint; config.json is not written.

  Args:
    folder: an existing folder. Files are not written atomically, so it should
      be a temporary folder that is renamed afterwards (`folder.atomic_dir`).
    tensors: by name, see `lazy_tensors`.
    shard_bytes: maximum size of a file that holds several tensors, and of the
      tensors in RAM.
  """
  groups: list[dict[str, LazyTensor]] = [{}]
  group_bytes = total = 0
  for name, tensor in tensors.items():
    if group_bytes and group_bytes + tensor.nbytes > shard_bytes:
      groups.append({})
      group_bytes = 0
    groups[-1][name] = tensor
    group_bytes, total = group_bytes + tensor.nbytes, total + tensor.nbytes
  weight_map = {}
  for i, group in enumerate(groups, 1):
    file = f'model-{i:05d}-of-{len(groups):05d}.safetensors'
    file = file if len(groups) > 1 else SINGLE
    write(
      folder / file,
      {name: tensor.make() for name, tensor in group.items()},
      {'format': 'pt'},
    )
    weight_map |= dict.fromkeys(group, file)
  if len(groups) > 1:
    index = {'metadata': {'total_size': total}, 'weight_map': weight_map}
    text = json.dumps(index, indent=2)
    (folder / INDEX).write_text(text, encoding='utf-8')


def _extract(leaves: dict[str, Any], slot: TensorSlot) -> np.ndarray:
  leaf = leaves[slot.name]
  leaf = np.asarray(leaf if slot.layer is None else leaf[slot.layer])
  if slot.transposed:
    return np.ascontiguousarray(leaf.reshape(slot.hf_shape[::-1]).T)
  return np.ascontiguousarray(leaf.reshape(slot.hf_shape))


def write(
  path: pathlib.Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]
) -> None:
  """Writes one safetensors file.

  Raises:
    OSError: if it cannot be written.
  """
  library = _library()
  try:
    library.numpy.save_file(tensors, path, metadata)
  except library.SafetensorError as e:
    raise OSError(f'{path.name}: {e}') from e
