"""Converts checkpoints between this package's formats and others.

  python -m sleep_jax.weights.convert IN OUT

The kind of IN determines the conversion:

  Hugging Face folder (Llama, Qwen2.5, Qwen3)  -> our folder, or OUT.npz
  the same with memory.safetensors             -> our folder, memory included
  GGUF file (Llama, Qwen2.5, Qwen3), .gguf     -> our folder, or OUT.npz
  llama2.c checkpoint, .bin                    -> our folder, or OUT.npz
  our folder, or .npz                          -> Hugging Face folder

A model with a memory becomes a plain checkpoint where that computes the same,
otherwise one with code of its own (`--form=custom`). `--form=merged` makes a
plain checkpoint of any, and prints what that costs; it needs `--dreams` of the
model if experts are in use. The last line of output states what was written.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
from typing import Any

from flax import traverse_util
import numpy as np

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.data import untrusted
from sleep_jax.data.tokenizers import gguf as gguf_tokenizer
from sleep_jax.models import memory as memory_lib
from sleep_jax.models import model as model_lib
from sleep_jax.models import transformer
from sleep_jax.weights import architectures
from sleep_jax.weights import expert_bank
from sleep_jax.weights import export
from sleep_jax.weights import folder as folder_lib
from sleep_jax.weights import gguf
from sleep_jax.weights import huggingface
from sleep_jax.weights import llama2c
from sleep_jax.weights import npz
from sleep_jax.weights.export import companions
from sleep_jax.weights.export import custom_form

FORMS = ('', 'custom', 'merged')


@dataclasses.dataclass(frozen=True)
class Options:
  """How our models are exported.

  form: one of FORMS; '' is plain where that is exact, else custom.
  source: a folder with the base's tokenizer and licence; default, those that
    were converted with the model.
  dreams: a .npy file of tokens that the model has sampled, `[N, T]`, -1 after
    the end of a row; for `merged`, where experts are in use.
  """

  form: str = ''
  source: pathlib.Path | None = None
  dreams: pathlib.Path | None = None

  def __post_init__(self):
    config.lookup(self.form, dict.fromkeys(FORMS), '--form')


def convert(
  source: pathlib.Path, out: pathlib.Path, options: Options | None = None
) -> str:
  """Converts `source` to `out`.

  Returns:
    What was written, in words.

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
  options = options or Options()
  if source.suffix == '.bin' and source.is_file():
    return _write(out, *llama2c.read(source))
  if source.suffix == '.npz' and source.is_file():
    return _export(model_lib.Model(*npz.read(source)), out, options)
  if not (source / 'config.json').is_file():
    raise config.ConfigError(
      f'{source} is neither a folder with a config.json nor a .gguf, .npz '
      'or .bin file; see python -m sleep_jax.weights.convert --help.'
    )
  values = untrusted.read_json(source / 'config.json')
  if values.get('format') != folder_lib.FORMAT:
    return _import(source, out)
  saved = folder_lib.load(source)
  model = model_lib.Model(saved.cfg, saved.params, saved.memory)
  own = untrusted.member(source, companions.FOLDER)
  if options.source is None and own.is_dir():
    options = dataclasses.replace(options, source=own)
  return _export(model, out, options)


def _import(source: pathlib.Path, out: pathlib.Path) -> str:
  """Reads a Hugging Face folder tensor by tensor, into memory-mapped files."""
  values = untrusted.read_json(source / 'config.json')
  cfg, bank, layout = _described(source, values)
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
      layout,
    )
    if bank:
      flat: dict[str, Any] = traverse_util.flatten_dict(params, sep='.')
      flat |= bank.params
      folder_lib.check_params(cfg, flat, str(source))
      params = traverse_util.unflatten_dict(flat, sep='.')
    folder_lib.fill(part, cfg, params, memory)
    companions.copy(source, part / companions.FOLDER)
    if architectures.is_custom(values):
      companions.write_config(
        part / companions.FOLDER, architectures.plain(values)
      )
  return _summary(out, cfg, params, memory)


def _import_gguf(source: pathlib.Path, out: pathlib.Path) -> str:
  """Reads a GGUF file tensor by tensor, into memory-mapped files."""
  file = gguf.opened(source)
  cfg = file.model
  if out.suffix == '.npz':
    return _write(out, cfg, gguf.load(file))
  with folder_lib.atomic_dir(out) as part:
    (part / companions.FOLDER).mkdir()
    ids = gguf_tokenizer.write(
      file.get, part / companions.FOLDER, str(source), cfg.vocab, cfg.max_len
    )
    allocate = folder_lib.allocator(part)
    params = gguf.load(
      file, lambda name, shape, dtype: allocate(f'params.{name}', shape, dtype)
    )
    folder_lib.fill(part, cfg, params, None)
    dtype = str(params['embed']['embedding'].dtype)
    values = architectures.to_hf_config(cfg, dtype) | ids
    text = json.dumps(values, indent=2) + '\n'
    (part / companions.FOLDER / 'config.json').write_text(
      text, encoding='utf-8'
    )
  return _summary(out, cfg, params, None)


def _described(
  source: pathlib.Path, values: dict[str, object]
) -> tuple[
  config.ModelConfig, expert_bank.SavedBank | None, huggingface.Layout | None
]:
  """The model in a Hugging Face folder, its memory file, its tensors' names."""
  custom = architectures.is_custom(values)
  file = untrusted.member(source, expert_bank.FILE)
  if not custom and not file.is_file():
    return architectures.model_config(values), None, None
  if not file.is_file():
    raise config.ConfigError(
      f'{file} is missing; without it transformers can run {source}, but '
      'nothing can restore the memory. Copy it from the export.'
    )
  bank = expert_bank.load(file)
  if not architectures.describes(architectures.plain(values), bank.cfg):
    raise config.ConfigError(
      f'{file} belongs to another backbone than the config.json beside it.'
    )
  huggingface.check_depth(source, bank.cfg)
  layout = custom_form.read_layout(bank.cfg, bank) if custom else None
  return bank.cfg, bank, layout


def _export(model: model_lib.Model, out: pathlib.Path, options: Options) -> str:
  """Writes a Hugging Face folder, plain where that is exact."""
  exact = export.why_not_plain(model) is None
  form = options.form or ('merged' if exact else 'custom')
  if form == 'custom':
    return export.custom(model, out, options.source)
  dreams = lengths = None
  if options.dreams and not exact:
    dreams, lengths = _read_dreams(options.dreams, model.cfg)
  report = export.merged(
    model, out, options.source, dreams=dreams, lengths=lengths
  )
  return str(report)


def _read_dreams(
  path: pathlib.Path, cfg: config.ModelConfig
) -> tuple[np.ndarray, np.ndarray]:
  """Tokens `[N, T]`, and how many of each row are real."""
  try:
    tokens = np.load(path)
  except (OSError, ValueError) as e:
    raise config.ConfigError(f'--dreams={path} cannot be read: {e}.') from e
  if (
    tokens.ndim != 2
    or tokens.dtype.kind not in 'iu'
    or not (-1 <= tokens.min() and tokens.max() < cfg.vocab)
  ):
    raise config.ConfigError(
      f'--dreams={path} is {tokens.dtype}{list(tokens.shape)}; it must be '
      f'tokens [N, T] below {cfg.vocab}, and -1 after the end of a row.'
    )
  real = tokens >= 0
  return np.where(real, tokens, 0), real.sum(axis=1)


def _write(
  out: pathlib.Path, cfg: config.ModelConfig, params: at.Params
) -> str:
  if out.suffix == '.npz':
    npz.save(out, params, cfg)
  else:
    folder_lib.save(out, cfg, params)
  return _summary(out, cfg, params, None)


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
  parser.add_argument('--form', default='', help='custom or merged')
  parser.add_argument(
    '--source', dest='companions', type=pathlib.Path, help="the base's folder"
  )
  parser.add_argument('--dreams', type=pathlib.Path, help='a .npy of tokens')
  args = parser.parse_args(argv)
  try:
    options = Options(args.form, args.companions, args.dreams)
    print(convert(args.source, args.out, options))
  except config.ConfigError as e:
    sys.exit(f'error: {e}')


if __name__ == '__main__':
  main()
