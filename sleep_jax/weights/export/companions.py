"""What travels with exported weights: tokenizer, licence, configs, a README."""

from collections.abc import Mapping
import json
import pathlib
import shutil
from typing import Any

from absl import logging

from sleep_jax import config
from sleep_jax.data import untrusted
from sleep_jax.weights import architectures

FOLDER = 'source'  # The subfolder for them in our own format.
_FILES = (
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
  'LICENSE.md',
  'NOTICE',
)
_TOKENIZERS = ('tokenizer.json', 'tokenizer.model', 'vocab.json')
_SPECIAL = ('bos', 'eos', 'pad')


def copy(source: pathlib.Path, target: pathlib.Path) -> None:
  """Copies what of `_FILES` there is, as it is; `target` is created.

  Raises:
    ConfigError: if one of them is a link out of the folder: what it points to
      would travel with the weights.
  """
  target.mkdir(exist_ok=True)
  for name in _FILES:
    if (file := untrusted.member(source, name)).is_file():
      shutil.copyfile(file, target / name)


def add(
  target: pathlib.Path,
  cfg: config.ModelConfig,
  source: pathlib.Path | None,
  dtype: str,
) -> tuple[dict[str, Any], str]:
  """Writes all companions of a checkpoint but its config.json and README.

  Args:
    target: an existing folder.
    cfg: the model; its slowest level is the MLP of the checkpoint.
    source: a folder with the base's companions, or None.
    dtype: of the checkpoint.

  Returns:
    The content of the plain checkpoint's config.json, the base's own where that
    describes `cfg`; and a warning, '' unless there is no tokenizer.
  """
  values = architectures.to_hf_config(cfg, dtype)
  if source is not None and source.is_dir():
    copy(source, target)
  if (target / 'config.json').exists():
    own = untrusted.read_json(target / 'config.json')
    own = architectures.plain(own)
    if architectures.describes(own, cfg, any_width=True):
      values = _with_values(own, values)
  _add_tokenizer_config(target, values)
  _add_generation_config(target, values)
  return values, _tokenizer_warning(target, source)


def write_config(target: pathlib.Path, values: Mapping[str, Any]) -> None:
  """Writes config.json, unless the one that is there says the same."""
  file = target / 'config.json'
  if not file.exists() or untrusted.read_json(file) != values:
    _write_json(file, values)


def _with_values(
  own: dict[str, Any], values: Mapping[str, Any]
) -> dict[str, Any]:
  """The base's own config.json, with class, width and type of `values`."""
  for name in ('architectures', 'intermediate_size'):
    own = own | {name: values[name]}
  if architectures.model_config(own).dtype == values['torch_dtype']:
    return own
  names = [n for n in ('dtype', 'torch_dtype') if n in own] or ['torch_dtype']
  return own | dict.fromkeys(names, values['torch_dtype'])


def _add_tokenizer_config(
  target: pathlib.Path, values: Mapping[str, Any]
) -> None:
  """Names the class, since a library cannot know it from `sleep_llama`."""
  file = target / 'tokenizer_config.json'
  if not (target / 'tokenizer.json').exists():
    return
  settings = untrusted.read_json(file) if file.exists() else {}
  if 'tokenizer_class' in settings:
    return
  texts = {i: text for text, i in _added_tokens(target).items()}
  for name in _SPECIAL:
    i = values.get(f'{name}_token_id')
    if not file.exists() and isinstance(i, int) and i in texts:
      settings[f'{name}_token'] = texts[i]
  _write_json(file, settings | {'tokenizer_class': 'PreTrainedTokenizerFast'})


def _add_generation_config(
  target: pathlib.Path, values: Mapping[str, Any]
) -> None:
  """Without one, a library does not know where an answer ends."""
  if (target / 'generation_config.json').exists():
    return
  ids, added, settings = {}, _added_tokens(target), {}
  for file in ('special_tokens_map.json', 'tokenizer_config.json'):
    if (target / file).exists():
      settings |= untrusted.read_json(target / file)
  for name in _SPECIAL:
    i = values.get(f'{name}_token_id')
    token = settings.get(f'{name}_token')
    if isinstance(token, dict):
      token = token.get('content')
    i = added.get(token) if i is None and isinstance(token, str) else i
    if i is not None:
      ids[f'{name}_token_id'] = i
  _write_json(target / 'generation_config.json', ids)


def _added_tokens(folder: pathlib.Path) -> dict[str, int]:
  """Special and other added tokens of a tokenizer.json, by their text."""
  if not (folder / 'tokenizer.json').exists():
    return {}
  file = folder / 'tokenizer.json'
  tokens = untrusted.read_json(file).get('added_tokens') or ()
  config.check_value(tuple[Any, ...], tokens, f'{file}: added_tokens')
  for token in tokens:
    config.check_mapping(token, f'{file}: added_tokens')
    config.check_value(str, token.get('content'), f'{file}: content')
    config.check_value(int, token.get('id'), f'{file}: id')
  return {token['content']: token['id'] for token in tokens}


def _tokenizer_warning(
  target: pathlib.Path, source: pathlib.Path | None
) -> str:
  if any((target / name).exists() for name in _TOKENIZERS):
    return ''
  where = 'no source was given' if source is None else f'{source} has none'
  text = (
    f'WARNING: no tokenizer is exported, because {where}; nothing can turn '
    'text into tokens for this model until tokenizer.json and '
    'tokenizer_config.json of its base are copied beside it.'
  )
  logging.warning(text)
  return text


def _write_json(path: pathlib.Path, values: Mapping[str, Any]) -> None:
  text = json.dumps(values, indent=2, ensure_ascii=False) + '\n'
  path.write_text(text, encoding='utf-8')
