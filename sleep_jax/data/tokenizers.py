"""Text to tokens and back, behind one protocol."""

import pathlib
from typing import Protocol

import sentencepiece

from sleep_jax import config


class Tokenizer(Protocol):
  """What a task needs of a tokenizer."""

  vocab: int
  pad: int
  bos: int
  separator: int  # Ends a segment of a document: a fact, an example.
  stop: int  # Ends a document; -1 = documents fill their row.

  def encode(self, text: str) -> list[int]: ...

  def decode(self, tokens: list[int]) -> str: ...


class WordTokenizer:
  """A closed vocabulary of words; what generated tasks speak."""

  def __init__(self, words: list[str], separator: str):
    self._words = ['<pad>', '<bos>', *words]
    self._ids = {w: i for i, w in enumerate(self._words)}
    self.vocab = len(self._words)
    self.pad, self.bos = 0, 1
    self.separator = self._ids[separator]
    self.stop = -1

  def encode(self, text: str) -> list[int]:
    """Ids of whitespace-separated words.

    Raises:
      KeyError: for a word outside the vocabulary.
    """
    return [self._ids[w] for w in text.split()]

  def decode(self, tokens: list[int]) -> str:
    return ' '.join(self._words[i] for i in tokens)


class SentencePieceTokenizer:
  """A sentencepiece `.model` with padding, BOS and EOS; EOS ends a document."""

  def __init__(self, path: pathlib.Path | str):
    if not pathlib.Path(path).exists():
      raise config.ConfigError(
        f'tokenizer file {str(path)!r} does not exist; train one with '
        'python -m experiments.pretrain, or correct the path.'
      )
    self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    self.vocab = self._model.vocab_size()
    self.pad, self.bos = self._model.pad_id(), self._model.bos_id()
    self.separator = self.stop = self._model.eos_id()

  def encode(self, text: str) -> list[int]:
    return self._model.encode(text)

  def decode(self, tokens: list[int]) -> str:
    return self._model.decode([int(i) for i in tokens])


def check_fits(tokenizer: Tokenizer, vocab: int) -> None:
  """Refuses a tokenizer whose ids the model's embedding does not hold."""
  if tokenizer.vocab > vocab:
    raise config.ConfigError(
      f'the tokenizer has {tokenizer.vocab} pieces but model.vocab={vocab}; '
      'use the tokenizer that the base was trained with, or a larger vocab.'
    )
