"""Converts checkpoints between this package's formats and others.

  python -m sleep_jax.weights.convert IN OUT

The kind of IN determines the conversion:

  Hugging Face folder (Llama, Qwen2.5, Qwen3)  -> our folder, or OUT.npz
  the same with memory.safetensors             -> our folder, memory included
  GGUF file (Llama, Qwen2.5, Qwen3), .gguf     -> our folder, or OUT.npz
  llama2.c checkpoint, .bin                    -> our folder, or OUT.npz
  our folder, or .npz                          -> Hugging Face folder

A model with a memory is merged into a plain checkpoint where that is exact;
otherwise the plain backbone is written with memory.safetensors beside it. The
last line of output states which, and why.
"""

import argparse
import json
import pathlib
import shutil
import sys

from flax import traverse_util

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.data.tokenizers import gguf as gguf_tokenizer
from sleep_jax.models import memory as memory_lib
from sleep_jax.models import transformer
from sleep_jax.weights import architectures
from sleep_jax.weights import expert_bank
from sleep_jax.weights import folder as folder_lib
from sleep_jax.weights import gguf
from sleep_jax.weights import huggingface
from sleep_jax.weights import llama2c
from sleep_jax.weights import npz

# Files that are copied with the weights, so that the output is complete.
_COMPANIONS = (
  'config.json',
  'generation_config.json',
  'tokenizer.json',
  'tokenizer.model',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'added_tokens.json',
  'vocab.json',
  'merges.txt',
  'chat_template.jinja',
  'chat_template.json',
  'LICENSE',
  'LICENSE.txt',
)
SOURCE = 'source'  # The subfolder for them in our format.


def convert(source: pathlib.Path, out: pathlib.Path) -> str:
  """Converts `source` to `out`.

  Returns:
    A line that describes the output.

  Raises:
    ConfigError: naming what cannot be read or does not match; `out` is then not
      created.
  """
  if out.exists():
    raise config.ConfigError(
      f'{out} exists already; name another output, or delete it yourself.'
    )
  if source.suffix == '.gguf' and source.is_file():
    return _import_gguf(source, out)
  if source.suffix == '.bin' and source.is_file():
    return _write(out, *llama2c.read(source))
  if source.suffix == '.npz' and source.is_file():
    return _export(out, *npz.read(source), None, None)
  if not (source / 'config.json').is_file():
    raise config.ConfigError(
      f'{source} is neither a folder with a config.json nor a .gguf, .npz '
      'or .bin file; see python -m sleep_jax.weights.convert --help.'
    )
  values = huggingface.read_json(source / 'config.json')
  if values.get('format') != folder_lib.FORMAT:
    return _import(source, out)
  saved = folder_lib.load(source)
  return _export(out, saved.cfg, saved.params, saved.memory, source / SOURCE)


def _import(source: pathlib.Path, out: pathlib.Path) -> str:
  """Reads a Hugging Face folder tensor by tensor, into memory-mapped files."""
  values = huggingface.read_json(source / 'config.json')
  cfg, bank = architectures.model_config(values), None
  if (source / expert_bank.FILE).exists():
    bank = expert_bank.load(source / expert_bank.FILE)
    if not architectures.describes(values, bank.cfg):
      raise config.ConfigError(
        f'{source / expert_bank.FILE} belongs to another backbone than the '
        'config.json beside it.'
      )
    cfg = bank.cfg
  memory = bank.memory if bank else None
  if out.suffix == '.npz':
    if bank:
      raise config.ConfigError(
        f'{out}: a .npz holds no memory; give a name without .npz.'
      )
    return _write(out, cfg, huggingface.load(source, cfg))
  with folder_lib.atomic_dir(out) as part:
    allocate = folder_lib.allocator(part)
    params = huggingface.load(
      source,
      cfg,
      lambda name, shape, dtype: allocate(f'params.{name}', shape, dtype),
    )
    if bank:
      flat = traverse_util.flatten_dict(params, sep='.') | dict(bank.params)
      params = traverse_util.unflatten_dict(flat, sep='.')
    folder_lib.fill(part, cfg, params, memory)
    _copy_companions(source, part / SOURCE)
  return _summary(out, cfg, params, memory)


def _import_gguf(source: pathlib.Path, out: pathlib.Path) -> str:
  """Reads a GGUF file tensor by tensor, into memory-mapped files."""
  file = gguf.opened(source)
  cfg = file.model
  if out.suffix == '.npz':
    return _write(out, cfg, gguf.load(file))
  with folder_lib.atomic_dir(out) as part:
    (part / SOURCE).mkdir()
    ids = gguf_tokenizer.write(
      file.get, part / SOURCE, str(source), cfg.vocab, cfg.max_len
    )
    allocate = folder_lib.allocator(part)
    params = gguf.load(
      file, lambda name, shape, dtype: allocate(f'params.{name}', shape, dtype)
    )
    folder_lib.fill(part, cfg, params, None)
    dtype = str(params['embed']['embedding'].dtype)
    values = architectures.to_hf_config(cfg, dtype) | ids
    text = json.dumps(values, indent=2) + '\n'
    (part / SOURCE / 'config.json').write_text(text, encoding='utf-8')
  return _summary(out, cfg, params, None)


def _export(
  out: pathlib.Path,
  cfg: config.ModelConfig,
  params: at.Params,
  memory: memory_lib.Memory | None,
  companions: pathlib.Path | None,
) -> str:
  """Writes a Hugging Face folder, merged where that is exact."""
  why = expert_bank.why_not_mergeable(cfg, params, memory)
  dtype = str(params['embed']['embedding'].dtype)
  hf_config = architectures.to_hf_config(cfg, dtype)
  with folder_lib.atomic_dir(out) as part:
    if companions and companions.is_dir():
      _copy_companions(companions, part)
    if not (
      (part / 'config.json').exists()
      and architectures.describes(
        huggingface.read_json(part / 'config.json'), cfg
      )
    ):
      text = json.dumps(hf_config, indent=2) + '\n'
      (part / 'config.json').write_text(text, encoding='utf-8')
    if why is None:
      params = expert_bank.merged(cfg, params, memory)
    else:
      expert_bank.save(part / expert_bank.FILE, cfg, params, memory)
    huggingface.save(part, cfg, params)
  if memory is None and why is None:
    return f'{out}: plain checkpoint; there was no memory.'
  if why is None:
    return (
      f'{out}: merged into a plain checkpoint, which computes the same logits; '
      'clocks and pending updates are not included.'
    )
  return (
    f'{out}: base + expert bank ({expert_bank.FILE}), because {why}. The plain '
    'checkpoint alone is the backbone without the memory; convert the folder '
    'back to load both.'
  )


def _write(
  out: pathlib.Path, cfg: config.ModelConfig, params: at.Params
) -> str:
  if out.suffix == '.npz':
    npz.save(out, params, cfg)
  else:
    folder_lib.save(out, cfg, params)
  return _summary(out, cfg, params, None)


def _copy_companions(source: pathlib.Path, target: pathlib.Path) -> None:
  """Copies the tokenizer, the licence and other `_COMPANIONS`."""
  target.mkdir(exist_ok=True)
  for name in _COMPANIONS:
    if (source / name).is_file():
      shutil.copyfile(source / name, target / name)


def _summary(
  out: pathlib.Path,
  cfg: config.ModelConfig,
  params: at.Params,
  memory: memory_lib.Memory | None,
) -> str:
  with_memory = 'with' if memory else 'without'
  return (
    f'{out}: {transformer.count(params):,} parameters '
    f'({params["embed"]["embedding"].dtype}), {len(cfg.levels)} level(s), '
    f'{with_memory} memory.'
  )


def main(argv: list[str] | None = None) -> None:
  """The command line."""
  parser = argparse.ArgumentParser(
    prog='python -m sleep_jax.weights.convert',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('source', metavar='IN', type=pathlib.Path)
  parser.add_argument('out', metavar='OUT', type=pathlib.Path)
  args = parser.parse_args(argv)
  try:
    print(convert(args.source, args.out))
  except config.ConfigError as e:
    sys.exit(f'error: {e}')


if __name__ == '__main__':
  main()
