"""Conversations of any tokenizer: by its chat template, or in plain words."""

from collections.abc import Sequence
from typing import Any

from sleep_jax.data import tokenizers
from sleep_jax.data.tokenizers import chat as template_lib

Message = dict[str, Any]  # {'role': ..., 'content': ...}
ROLES = ('system', 'user', 'assistant')
_NAMES = {'user': 'Question: ', 'assistant': 'Answer: '}


class PlainChat:
  """What `ChatFormat` is, for a tokenizer without a chat template.

  A conversation is lines, those of the user after `Question:` and those of the
  assistant after `Answer:`, between BOS and the stop token.
  """

  def __init__(self, tokenizer: tokenizers.Tokenizer):
    self._tokenizer = tokenizer

  def prompt(self, question: str | list[Message]) -> list[int]:
    """A question, or a conversation so far, up to the assistant's turn."""
    if isinstance(question, str):
      question = [{'role': 'user', 'content': question}]
    return self._ids([*_lines(question), 'Answer:'])

  def document(self, messages: Sequence[Message]) -> list[int]:
    """A whole conversation."""
    return [*self._ids(_lines(messages)), self._tokenizer.separator]

  @property
  def before_user(self) -> list[int]:
    """What stands before the user's first words."""
    return self._ids(['Question:'])

  def frame(self, stop: int) -> tuple[tuple[int, ...], ...]:
    """A conversation without its content: all but its beginning is made up."""
    del stop
    return (tuple(self.before_user),)

  def _ids(self, lines: list[str]) -> list[int]:
    return [self._tokenizer.bos, *self._tokenizer.encode('\n'.join(lines))]


Chat = template_lib.ChatFormat | PlainChat


def template_tokens(tokenizer: tokenizers.Tokenizer) -> int:
  """Tokens of a question's and an answer's frame; 0 without a template."""
  form = of(tokenizer)
  if isinstance(form, PlainChat):
    return 0
  return sum(map(len, form.frame(tokenizer.stop)))


def of(tokenizer: tokenizers.Tokenizer) -> Chat:
  """How this tokenizer writes conversations.

  Raises:
    ConfigError: if it has a chat template, and that fails.
  """
  if getattr(tokenizer, 'has_chat_template', False):
    return template_lib.chat_of(tokenizer)
  return PlainChat(tokenizer)


def turns(tokenizer: tokenizers.Tokenizer, tokens: list[int]) -> str:
  """Text of a document that was made up, without what the template adds.

  Of a conversation, what each side says is a line.
  """
  frame = of(tokenizer).frame(tokenizer.stop)
  between = [tokenizer.stop, *frame[1]] if len(frame) > 1 else []
  for i in range(len(tokens)):
    if between and tokens[i : i + len(between)] == between:
      parts = tokens[:i], tokens[i + len(between) :]
      return '\n'.join(tokenizer.decode(part).strip() for part in parts)
  return tokenizer.decode(tokens).strip()


def _lines(messages: Sequence[Message]) -> list[str]:
  return [_NAMES.get(m['role'], '') + m['content'] for m in messages]
