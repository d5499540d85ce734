"""Hugging Face `tokenizer.json`, and the chat template beside it.

Needs the extra `hf` (libraries `tokenizers` and `jinja2`).
"""

import importlib
import pathlib
from types import ModuleType
from typing import Any

from sleep_jax import config
from sleep_jax.data import untrusted
from sleep_jax.data.tokenizers import template

Message = dict[str, Any]  # {'role': ..., 'content': ...}


def _library(name: str) -> ModuleType:
  try:
    return importlib.import_module(name)
  except ImportError:
    raise config.ConfigError(
      f"this tokenizer needs the library {name!r}; pip install 'sleep_jax[hf]'."
    ) from None


class HuggingFaceTokenizer:
  """A folder with `tokenizer.json` and `tokenizer_config.json`.

  A family without BOS (Qwen) begins documents with its padding token, and one
  without padding (Llama) pads with EOS. EOS ends a document. `prepends_bos`:
  see `tokenizer.prepends_bos`.

  Args:
    folder: of the checkpoint.

  Raises:
    ConfigError: if a file is absent or broken, or names no EOS.
  """

  def __init__(self, folder: pathlib.Path | str):
    self._folder = folder = pathlib.Path(folder)
    file = untrusted.member(folder, 'tokenizer.json')
    if not file.is_file():
      raise config.ConfigError(
        f'{str(file)!r} does not exist; give the folder of a Hugging Face '
        'checkpoint.'
      )
    library = _library('tokenizers')
    try:
      self._model = library.Tokenizer.from_file(str(file))
      ids = self._model.get_vocab().values()
    except Exception as e:  # The library raises no narrower type.
      raise config.ConfigError(
        f'{file} is no tokenizer.json: {untrusted.reason(e)}'
      ) from None
    if not ids:
      raise config.ConfigError(f'{file} is no tokenizer.json: it has no token.')
    self._config = _json(folder / 'special_tokens_map.json') | _json(
      folder / 'tokenizer_config.json'
    )
    self._special = _special_tokens(self._config, folder)
    self.vocab = 1 + max(ids)
    eos = self._id('eos_token')
    if eos is None:
      raise config.ConfigError(
        f'{folder}: tokenizer_config.json names no eos_token that is in '
        'tokenizer.json; without it no document ends.'
      )
    pad, bos = self._id('pad_token'), self._id('bos_token')
    self.pad = eos if pad is None else pad
    self.bos = self.pad if bos is None else bos
    self.separator = self.stop = eos
    # As the library encodes a text by itself: whether it adds BOS.
    added = self._model.encode('a').ids[:1] == [self.bos]
    self.prepends_bos = added or self._config.get('add_bos_token') is True

  def encode(self, text: str) -> list[int]:
    """Ids without BOS and EOS; special tokens in `text` are recognised."""
    return self._model.encode(text, add_special_tokens=False).ids

  def decode(self, tokens: list[int]) -> str:
    """Text; special tokens are dropped."""
    return self._model.decode([int(i) for i in tokens])

  def apply_chat_template(
    self,
    messages: list[Message],
    add_generation_prompt: bool = False,
    **variables: Any,
  ) -> str:
    """A conversation as text, by the checkpoint's own template.

    Args:
      messages: the conversation so far, oldest first.
      add_generation_prompt: end with the head of the assistant's turn.
      **variables: further variables of the template (`tools`, ...), as JSON
        values.

    Raises:
      ConfigError: if there is no template, it rejects the messages, or takes
        too much time or memory (`template_worker`).
    """
    _library('jinja2')
    if (chat_template := self._chat_template()) is None:
      raise config.ConfigError(
        f'{self._folder} has no chat template, neither chat_template.jinja '
        'nor chat_template in tokenizer_config.json; a base model has none. '
        'Use encode on plain text.'
      )
    variables |= self._special
    variables |= {
      'messages': messages,
      'add_generation_prompt': add_generation_prompt,
    }
    try:
      return _unicode(template.render(chat_template, variables))
    except ValueError as e:
      raise config.ConfigError(
        f'{self._folder}: the chat template refuses these messages: {e}'
      ) from None

  @property
  def has_chat_template(self) -> bool:
    """Whether `apply_chat_template` may be called."""
    return self._chat_template() is not None

  def _chat_template(self) -> str | None:
    file = untrusted.member(self._folder, 'chat_template.jinja')
    if file.exists():
      return untrusted.read_text(file)
    where = f'{self._folder}/tokenizer_config.json: chat_template'
    found = self._config.get('chat_template')
    if isinstance(found, list):  # Several, by name.
      for named in found:
        config.check_mapping(named, where)
      found = {str(t.get('name')): t.get('template') for t in found}
      found = found.get('default')
    if not found:
      return None
    config.check_value(str, found, where)
    return found

  def _id(self, name: str) -> int | None:
    token = self._special.get(name)
    return None if token is None else self._model.token_to_id(token)


def _special_tokens(
  settings: dict[str, Any], folder: pathlib.Path
) -> dict[str, str]:
  """The special tokens' text by name (`eos_token`), of those that are set."""
  tokens = {}
  for name, token in settings.items():
    if not name.endswith('_token') or not isinstance(token, (str, dict)):
      continue
    text = token.get('content') if isinstance(token, dict) else token
    try:
      if not isinstance(text, str):
        raise ValueError(f'{text!r} is no text')
      tokens[name] = _unicode(text)
    except ValueError as e:
      raise config.ConfigError(f'{folder}: the content of {name}: {e}.') from e
  return tokens


def _unicode(text: str) -> str:
  """The same text.

  Raises:
    ValueError: if it has half of a surrogate pair, which JSON can spell.
  """
  text.encode('utf-8')
  return text


def _json(file: pathlib.Path) -> dict[str, Any]:
  """The content of a JSON file; nothing if it is absent."""
  return untrusted.read_json(file) if file.exists() else {}
