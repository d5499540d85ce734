"""A chat template as token ids: prompts, whole conversations, empty frames."""

from collections.abc import Sequence
import functools
from typing import Any

from sleep_jax import config

Message = dict[str, Any]  # {'role': ..., 'content': ...}
# Stand for contents when a template is taken apart.
_USER, _ASSISTANT = 'Uu0u0U', 'Aa1a1A'


class ChatFormat:
  """The chat template of one tokenizer.

  Args:
    tokenizer: has `apply_chat_template`, see `HuggingFaceTokenizer`.
    system: content of a system message before every conversation; None = as
      the template has it.

  Raises:
    ConfigError: if the tokenizer has no template, or rejects plain messages.
  """

  def __init__(self, tokenizer: Any, system: str | None = None):
    self._tokenizer, self._system = tokenizer, system
    text = self._render([_user(_USER), _assistant(_ASSISTANT)])
    prompt = self._render([_user(_USER)], add_generation_prompt=True)
    parts = prompt.split(_USER)
    if len(parts) != 2 or not -1 < text.find(_USER) < text.find(_ASSISTANT):
      raise config.ConfigError(
        'the chat template does not give the messages as they are, once each '
        'and in their order.'
      )
    self._before_user, self._before_assistant = parts

  def prompt(self, question: str | Sequence[Message]) -> list[int]:
    """A question, or a conversation so far, up to the assistant's turn."""
    messages = [_user(question)] if isinstance(question, str) else question
    return self._encode(self._render(messages, add_generation_prompt=True))

  def document(self, messages: Sequence[Message]) -> list[int]:
    """A whole conversation."""
    return self._encode(self._render(messages))

  @functools.cached_property
  def before_user(self) -> list[int]:
    """What stands before the user's first words."""
    return self._encode(self._before_user)

  @functools.cached_property
  def before_assistant(self) -> list[int]:
    """What stands between the user's words and the assistant's."""
    return self._encode(self._before_assistant)

  def frame(self, stop: int) -> tuple[tuple[int, ...], ...]:
    """A conversation of one question and one answer without their content.

    Args:
      stop: the token that ends a turn; the model writes it itself.
    """
    between = self.before_assistant
    if between and between[0] == stop:
      between = between[1:]
    return tuple(self.before_user), tuple(between)

  def _render(self, messages: Sequence[Message], **options: Any) -> str:
    if self._system is not None and messages[0]['role'] != 'system':
      messages = [{'role': 'system', 'content': self._system}, *messages]
    return self._tokenizer.apply_chat_template(list(messages), **options)

  def _encode(self, text: str) -> list[int]:
    return self._tokenizer.encode(text)


def chat_of(tokenizer: Any, system: str | None = None) -> ChatFormat:
  """The chat format of a tokenizer.

  Raises:
    ConfigError: if it has none.
  """
  if not hasattr(tokenizer, 'apply_chat_template'):
    raise config.ConfigError(
      f'{type(tokenizer).__name__} has no chat template; use the tokenizer of '
      'an instruct model (a folder with tokenizer.json and a template).'
    )
  return ChatFormat(tokenizer, system)


def _user(content: str) -> Message:
  return {'role': 'user', 'content': content}


def _assistant(content: str) -> Message:
  return {'role': 'assistant', 'content': content}
