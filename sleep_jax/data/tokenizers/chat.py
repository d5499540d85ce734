"""Prompts of an instruct model: a user's turn, in the model's own template."""

from typing import Any

from sleep_jax import config


def prompt(tokenizer: Any, content: str) -> list[int]:
  """A conversation of one user's turn, up to where the assistant answers.

  The ids begin with BOS, as every row does, whether or not the template has it.
  An answer ends with the tokenizer's stop token, which ends a turn.

  Args:
    tokenizer: with a chat template (`HuggingFaceTokenizer`).
    content: what the user says.

  Raises:
    ConfigError: if the tokenizer has no chat template.
  """
  apply = getattr(tokenizer, 'apply_chat_template', None)
  if apply is None:
    raise config.ConfigError(
      'task.chat=True needs the tokenizer of an instruct model, a folder with '
      'a chat template; use task.chat=False, or another task.tokenizer.'
    )
  messages = [{'role': 'user', 'content': content}]
  ids = tokenizer.encode(apply(messages, add_generation_prompt=True))
  return ids if ids[:1] == [tokenizer.bos] else [tokenizer.bos, *ids]
