"""Text to tokens and back, behind one protocol."""

import pathlib
from typing import Protocol

import sentencepiece

from sleep_jax import config
from sleep_jax.data import catalog
from sleep_jax.data import hf_tokenizer
from sleep_jax.data import llama2c_tokenizer

_UNKNOWN = '<unk>'


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


class WordTokenizer:
  """A closed vocabulary of words; what generated tasks speak.

  Args:
    words: the vocabulary, without padding and BOS.
    separator: which of them ends a segment.
    stop: which of them ends a document; empty = none does.
  """

  def __init__(self, words: list[str], separator: str, stop: str = ''):
    self._words = ['<pad>', '<bos>', *words]
    self._ids = {w: i for i, w in enumerate(self._words)}
    self.vocab = len(self._words)
    self.pad, self.bos = 0, 1
    self.separator = self._ids[separator]
    self.stop = self._ids[stop] if stop else -1

  def encode(self, text: str) -> list[int]:
    """Ids of whitespace-separated words.

    Raises:
      KeyError: for a word outside the vocabulary.
    """
    return [self._ids[w] for w in text.split()]

  def decode(self, tokens: list[int]) -> str:
    known = range(self.vocab)
    return ' '.join(self._words[i] if i in known else _UNKNOWN for i in tokens)


class SentencePieceTokenizer:
  """A sentencepiece `.model` with BOS and EOS; EOS ends a document."""

  def __init__(self, path: pathlib.Path | str):
    if not pathlib.Path(path).exists():
      raise config.ConfigError(
        f'tokenizer file {str(path)!r} does not exist; train one with '
        'python -m experiments.pretrain, or correct the path.'
      )
    try:
      self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except RuntimeError as e:
      raise config.ConfigError(f'{path} is no sentencepiece model: {e}') from e
    self.vocab = self._model.vocab_size()
    self.bos = self._model.bos_id()
    self.separator = self.stop = self._model.eos_id()
    if min(self.bos, self.stop) < 0:
      raise config.ConfigError(
        f'{path} has BOS {self.bos} and EOS {self.stop}, -1 meaning none; '
        'documents need both.'
      )
    # Llama 2's has no padding; what is padded is masked, so any id serves.
    self.pad = max(self._model.pad_id(), 0)

  def encode(self, text: str) -> list[int]:
    return self._model.encode(text)

  def decode(self, tokens: list[int]) -> str:
    unknown, known = self._model.unk_id(), range(self.vocab)
    return self._model.decode(
      [int(i) if i in known else unknown for i in tokens]
    )


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
    return hf_tokenizer.HuggingFaceTokenizer(path)
  if path.name == 'tokenizer.json':
    return hf_tokenizer.HuggingFaceTokenizer(path.parent)
  if path.suffix == '.model':
    return SentencePieceTokenizer(path)
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
