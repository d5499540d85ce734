"""The tokenizer of a GGUF file, as the files of a Hugging Face folder.

Needs the extra `hf` (library `tokenizers`). Byte-level BPE only. GGUF names the
rule that splits text into words, `tokenizer.ggml.pre`, but does not hold it:
the rules are Hugging Face's, of the tokenizers that the names stand for.
"""

from collections.abc import Callable
import dataclasses
import importlib
import json
import pathlib
from types import ModuleType
from typing import Any

from sleep_jax import config
from sleep_jax.data import untrusted

# (name, default) -> a value of the file's metadata.
Get = Callable[..., Any]
# Types of a token in the file; 1 is an ordinary one, a piece of text.
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5
# Words: contractions, letters with one sign before them, digits, signs, space.
_PATTERN = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS"
  r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)


@dataclasses.dataclass(frozen=True)
class _Rule:
  """How text is prepared for BPE.

  Attributes:
    pattern: of a word; '' is the pattern of GPT-2.
    single_digits: whether every digit is split off first.
    nfc: whether text is normalised (Unicode NFC).
    whole_words: whether a word that is a token is not built from merges.
  """

  pattern: str = ''
  single_digits: bool = False
  nfc: bool = False
  whole_words: bool = False


_QWEN2 = _Rule(_PATTERN.replace('DIGITS', r'\p{N}'), nfc=True)
_LLAMA3 = _Rule(_PATTERN.replace('DIGITS', r'\p{N}{1,3}'), whole_words=True)
_RULES = {
  'gpt-2': _Rule(),
  'smollm': _Rule(single_digits=True),
  'qwen2': _QWEN2,
  'deepseek-r1-qwen': _QWEN2,
  'llama-bpe': _LLAMA3,
  'llama3': _LLAMA3,
  'llama-v3': _LLAMA3,
}
_END_OF_TURN = 'tokenizer.ggml.eot_token_id'
_ROLES = {
  'bos_token': 'bos',
  'eos_token': 'eos',
  'unk_token': 'unknown',
  'pad_token': 'padding',
}


def write(
  get: Get, folder: pathlib.Path, where: str, vocab: int, max_len: int
) -> dict[str, int | list[int]]:
  """Writes tokenizer.json, tokenizer_config.json and generation_config.json.

  Args:
    get: the file's metadata.
    folder: an existing folder.
    where: the file, for messages.
    vocab: rows of the model's embedding.
    max_len: the longest context of the model.

  Returns:
    `bos_token_id`, `eos_token_id` and `pad_token_id`, as far as the file has
    them, for a config.json.

  Raises:
    ConfigError: if the kind of tokenizer is unknown, or does not fit the model.
  """
  tokens = _checked_tokens(get, where, vocab)
  ids = {
    role: get(f'tokenizer.ggml.{name}_token_id')
    for role, name in _ROLES.items()
  }
  ids = {role: i for role, i in ids.items() if i is not None}
  generation = _generation_ids(get, ids)
  for role, i in (ids | {'eot_token': get(_END_OF_TURN)}).items():
    if i is not None and (not isinstance(i, int) or not 0 <= i < len(tokens)):
      raise config.ConfigError(
        f'{where}: {role} is token {i!r}, but the tokenizer has {len(tokens)}.'
      )
  special = {role: tokens[i] for role, i in ids.items()}
  bos = ids.get('bos_token') if get('tokenizer.ggml.add_bos_token') else None
  _build(get, where, tokens, bos).save(str(folder / 'tokenizer.json'))
  settings = special | {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'model_max_length': max_len,
    'clean_up_tokenization_spaces': False,
  }
  if template := get('tokenizer.chat_template'):
    config.check_value(str, template, f'{where}: tokenizer.chat_template')
    settings['chat_template'] = template
  _write(folder / 'tokenizer_config.json', settings)
  _write(folder / 'special_tokens_map.json', special)
  _write(folder / 'generation_config.json', generation)
  return generation


def _checked_tokens(get: Get, where: str, vocab: int) -> list[str]:
  if (kind := get('tokenizer.ggml.model')) != 'gpt2':
    raise config.ConfigError(
      f'{where}: tokenizer.ggml.model={kind!r} is unknown; only gpt2 '
      "(byte-level BPE) is read. Convert the model's Hugging Face folder."
    )
  tokens, merges = get('tokenizer.ggml.tokens'), get('tokenizer.ggml.merges')
  if not tokens or not merges:
    raise config.ConfigError(f'{where} holds no tokens or no merges.')
  for name, texts in (('tokens', tokens), ('merges', merges)):
    config.check_value(tuple[str, ...], texts, f'{where}: {name}')
  if len(tokens) > vocab:
    raise config.ConfigError(
      f'{where}: the tokenizer has {len(tokens)} tokens, but the embedding '
      f'{vocab} rows; the file is damaged.'
    )
  return tokens


def _build(get: Get, where: str, tokens: list[str], bos: int | None) -> Any:
  """The tokenizer; a `bos` is put before every text when asked for."""
  library = _library()
  rule = config.lookup(
    str(get('tokenizer.ggml.pre', 'default')),
    _RULES,
    f'{where}: tokenizer.ggml.pre',
  )
  kinds = get('tokenizer.ggml.token_type') or [1] * len(tokens)
  config.check_value(tuple[Any, ...], kinds, f'{where}: token_type')
  if len(kinds) != len(tokens):
    raise config.ConfigError(
      f'{where}: {len(tokens)} tokens have {len(kinds)} types.'
    )
  vocab = {t: i for i, t in enumerate(tokens) if kinds[i] != _UNUSED}
  merges = [tuple(m.split(' ', 1)) for m in get('tokenizer.ggml.merges')]
  try:
    model = library.models.BPE(
      vocab, merges, fuse_unk=False, ignore_merges=rule.whole_words
    )
  except Exception as e:  # The library raises no narrower type.
    raise config.ConfigError(
      f'{where}: the merges do not fit the tokens: {untrusted.reason(e)}'
    ) from None
  tokenizer = library.Tokenizer(model)
  if rule.nfc:
    tokenizer.normalizer = library.normalizers.NFC()
  tokenizer.pre_tokenizer = _pre_tokenizer(library, rule)
  tokenizer.decoder = library.decoders.ByteLevel()
  for i, token in enumerate(tokens):
    if kinds[i] in (_CONTROL, _USER_DEFINED):
      special = kinds[i] == _CONTROL
      added = library.AddedToken(token, special=special, normalized=False)
      (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(
        [added]
      )
  if bos is not None:
    tokenizer.post_processor = _prepend(library, tokens[bos], bos, where)
  return tokenizer


def _prepend(library: ModuleType, token: str, i: int, where: str) -> Any:
  """Puts a token before every text."""
  try:
    return library.processors.TemplateProcessing(
      single=f'{token} $A',
      pair=f'{token} $A {token}:1 $B:1',
      special_tokens=[(token, i)],
    )
  except ValueError as e:
    raise config.ConfigError(
      f'{where}: {token!r} cannot be a BOS: {e}'
    ) from None


def _pre_tokenizer(library: ModuleType, rule: _Rule) -> Any:
  pre = library.pre_tokenizers
  steps = [pre.Digits(individual_digits=True)] if rule.single_digits else []
  if rule.pattern:
    pattern = library.Regex(rule.pattern)
    steps.append(pre.Split(pattern, behavior='isolated'))
  steps.append(
    pre.ByteLevel(add_prefix_space=False, use_regex=not rule.pattern)
  )
  return pre.Sequence(steps)


def _generation_ids(get: Get, ids: dict[str, Any]) -> dict[str, Any]:
  """BOS, EOS and padding; a turn's end, if it is another token, is an EOS."""
  out: dict[str, Any] = {
    f'{role}_id': i for role, i in ids.items() if role != 'unk_token'
  }
  eos, end = ids.get('eos_token'), get(_END_OF_TURN)
  if eos is not None and end not in (None, eos):
    out['eos_token_id'] = [eos, end]
  return out


def _write(file: pathlib.Path, values: dict[str, Any]) -> None:
  text = json.dumps(values, indent=2, ensure_ascii=False) + '\n'
  file.write_text(text, encoding='utf-8')


def _library() -> ModuleType:
  try:
    return importlib.import_module('tokenizers')
  except ImportError:
    raise config.ConfigError(
      "this tokenizer needs the library 'tokenizers'; "
      "pip install 'sleep_jax[hf]'."
    ) from None
