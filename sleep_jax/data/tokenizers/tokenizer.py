"""Text to tokens and back, behind one protocol."""

import pathlib
from typing import Protocol

from sleep_jax import config
from sleep_jax.data import tokenizers
from sleep_jax.data.datasets import catalog
from sleep_jax.data.tokenizers import huggingface as huggingface_tokenizer
from sleep_jax.data.tokenizers import llama2c as llama2c_tokenizer


class Tokenizer(Protocol):
  """What a task needs of a tokenizer."""

  vocab: int
  pad: int
  bos: int
  separator: int  # Ends a segment of a document: a fact, an example.
  stop: int  # Ends a document; -1 = documents fill their row.

  def encode(self, text: str) -> list[int]: ...

  def decode(self, tokens: list[int]) -> str:
    """Text; a model with a wider head may say ids that stand for none."""
    ...


def load(path: pathlib.Path | str, folder: str | None = None) -> Tokenizer:
  """A tokenizer by what `path` is.

  Args:
    path: a sentencepiece `.model`, a llama2.c `.bin` (of one's own, or listed
      in `catalog`), or the folder of a Hugging Face checkpoint (or the
      `tokenizer.json` in it).
    folder: the data folder, see `sources.data_dir`.

  Raises:
    ConfigError: if it is none of these, or broken.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    return huggingface_tokenizer.HuggingFaceTokenizer(path)
  if path.name == 'tokenizer.json':
    return huggingface_tokenizer.HuggingFaceTokenizer(path.parent)
  if path.suffix == '.model':
    return tokenizers.SentencePieceTokenizer(path)
  if path.suffix == '.bin':
    content = catalog.read(str(path), folder)
    return llama2c_tokenizer.Llama2cTokenizer(content, path.name)
  raise config.ConfigError(
    f'tokenizer {str(path)!r} does not exist, or is none of: a .model of '
    'sentencepiece, a .bin of llama2.c, a folder with tokenizer.json.'
  )


def check_fits(tokenizer: Tokenizer, vocab: int) -> None:
  """Refuses a tokenizer whose ids the model's embedding does not hold."""
  if tokenizer.vocab > vocab:
    raise config.ConfigError(
      f'the tokenizer has {tokenizer.vocab} pieces but model.vocab={vocab}; '
      'use the tokenizer that the base was trained with, or a larger vocab.'
    )
