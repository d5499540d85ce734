"""Hugging Face `tokenizer.json`, and the chat template beside it.

Needs the extra `hf` (libraries `tokenizers` and `jinja2`).
"""

import importlib
import json
import pathlib
from types import ModuleType
from typing import Any

from sleep_jax import config

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
    file = folder / 'tokenizer.json'
    if not file.exists():
      raise config.ConfigError(
        f'{str(file)!r} does not exist; give the folder of a Hugging Face '
        'checkpoint.'
      )
    library = _library('tokenizers')
    try:
      self._model = library.Tokenizer.from_file(str(file))
    except Exception as e:  # The library raises no narrower type.
      raise config.ConfigError(f'{file} is no tokenizer.json: {e}') from None
    self._config = _json(folder / 'special_tokens_map.json') | _json(
      folder / 'tokenizer_config.json'
    )
    self._special = {
      name: token if isinstance(token, str) else token['content']
      for name, token in self._config.items()
      if name.endswith('_token') and isinstance(token, (str, dict))
    }
    self.vocab = 1 + max(self._model.get_vocab().values())
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
      **variables: further variables of the template (`tools`, ...).

    Raises:
      ConfigError: if there is no template, or it rejects the messages.
    """
    jinja2 = _library('jinja2')
    try:
      template = self._environment().from_string(self._chat_template())
      return template.render(
        **self._special,
        messages=messages,
        add_generation_prompt=add_generation_prompt,
        **variables,
      )
    except jinja2.TemplateError as e:
      raise config.ConfigError(
        f'{self._folder}: the chat template refuses these messages: {e}'
      ) from None

  def _environment(self) -> Any:
    """The environment that templates expect, in a sandbox."""
    jinja2, sandbox = _library('jinja2'), _library('jinja2.sandbox')

    def refuse(message: str) -> None:
      raise jinja2.TemplateError(message)

    environment = sandbox.ImmutableSandboxedEnvironment(
      trim_blocks=True,
      lstrip_blocks=True,
      extensions=['jinja2.ext.loopcontrols'],
    )
    environment.globals['raise_exception'] = refuse
    # Jinja's filter of this name escapes HTML characters.
    environment.filters['tojson'] = lambda x, indent=None: json.dumps(
      x, ensure_ascii=False, indent=indent
    )
    return environment

  def _chat_template(self) -> str:
    file = self._folder / 'chat_template.jinja'
    if file.exists():
      return file.read_text(encoding='utf-8')
    template = self._config.get('chat_template')
    if isinstance(template, list):  # Several, by name.
      template = {t['name']: t['template'] for t in template}.get('default')
    if not template:
      raise config.ConfigError(
        f'{self._folder} has no chat template, neither chat_template.jinja '
        'nor chat_template in tokenizer_config.json; a base model has none. '
        'Use encode on plain text.'
      )
    return template

  def _id(self, name: str) -> int | None:
    token = self._special.get(name)
    return None if token is None else self._model.token_to_id(token)


def _json(file: pathlib.Path) -> dict[str, Any]:
  """The content of a JSON file; nothing if it is absent."""
  if not file.exists():
    return {}
  try:
    return json.loads(file.read_text(encoding='utf-8'))
  except json.JSONDecodeError as e:
    raise config.ConfigError(f'{file} is not JSON: {e}') from None
